"""The GPU's kernels through Triton's compiler, for GPUs that are not here: that they compile, and that the code reads 16 bytes
at a time and keeps its numbers in registers. In a process of its own, since in this one Triton interprets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.read_only import bound, read_only

ROOT = Path(__file__).parents[2]
PROGRAM = '''
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import decode_attention, ragged_attention

def build(kernel, types, sizes):
    """With what Triton finds out at a launch: pointers and strides of the engine are multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else types.get(name, "*" + types["float"]) for name in names}
    even = [i for i, name in enumerate(names) if signature[name].startswith("*") or name == "q_stride"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(kernel, signature, sizes, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

capability, kind = int(sys.argv[1]), sys.argv[2]
numbers = dict.fromkeys(("begins", "starts", "spans", "tables"), "*i32") | {"slots": "*i64", "scale": "fp32", "float": kind}
numbers |= dict.fromkeys(("q_stride", "table_width", "rows"), "i32") | dict.fromkeys(("peaks", "totals"), "*fp32")
shape = {"HEADS": 16, "HEAD_SIZE": 64}
paged = shape | {"BLOCK_SIZE": 16, "TILE": decode_attention.TILE}
print(json.dumps({
    "decode": build(decode_attention._decode, numbers, paged | {"SPLITS": 1}),
    "split": build(decode_attention._decode, numbers | {"partial": "*fp32"}, paged | {"SPLITS": 16}),
    "combine": build(decode_attention._combine, numbers | {"partial": "*fp32"}, shape | {"SPLITS": 16}),
    "ragged": build(ragged_attention._ragged, numbers, paged | {"QUERIES": ragged_attention.QUERIES}),
}))
'''


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile_for_ampere_and_hopper_and_read_16_bytes_at_a_time(capability: int, kind: str):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(capability), kind]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = json.loads(done.stdout.splitlines()[-1])
    for name in ("decode", "split"):
        assert code[name].count("ld.global.v4.b32") >= 8, f"{name}: four loads of K and four of V"
        assert ".local" not in code[name], f"{name}: numbers that did not fit into registers"
    if kind != "fp32":
        assert "mma" in code["ragged"], "on the tensor cores"


KEPT_WHERE = """
import kernels, numba
from pathlib import Path
@numba.njit(cache=True)
def one():
    return 1
print(one(), numba.config.CACHE_DIR, len(list(Path(numba.config.CACHE_DIR).rglob("*.nbi"))))
"""


def test_where_the_repository_cannot_be_written_numbas_kernels_are_kept_for_the_process_alone(tmp_path: Path):
    house = tmp_path / "house"
    shutil.copytree(ROOT / "kernels", house / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (house / "program.py").write_text(KEPT_WHERE, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "HOME")}

    def run(*before: str) -> list[str]:
        command = [*before, sys.executable, "program.py"]
        return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, check=True).stdout.split()

    with read_only(house / "kernels"):
        one, folder, kept = run(*bound())
    assert (one, kept) == ("1", "1")
    assert not Path(folder).exists(), "cleared away at the end"
    _, folder, _ = run()
    assert Path(folder).is_relative_to(house / "kernels")
    (Path(folder) / "more.nbi").touch()
    with read_only(Path(folder)):
        one, copy, kept = run(*bound())
    assert (one, kept) == ("1", "2"), "what was kept before is found"
    assert copy != folder
