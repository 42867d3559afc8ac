"""The benchmarks of the GPU's path, on a processor: that they run, and that they would see an error."""

import subprocess
import sys

import pytest
import torch

from benchmarks import agreement, kernels


def test_attention_is_timed_and_compared_with_float64(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "SECONDS", 0.01)
    monkeypatch.setattr(kernels, "COPY_BYTES", 1 << 20)
    file = tmp_path / "kernels.csv"
    flags = ["--device", "cpu", "--batches", "1,3", "--contexts", "1,17", "--csv", str(file)]
    monkeypatch.setattr(sys, "argv", ["kernels", *flags])
    kernels.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ours", "SDPA"))]
    assert len(table) == 2 * 4
    assert all(float(line.split()[-1]) < 0.01 for line in table), table
    assert len(file.read_text().splitlines()) == 1 + 2 * 4


def test_a_kernel_that_computes_something_else_shows_its_error(monkeypatch: pytest.MonkeyPatch):
    inputs = kernels.Inputs(2, 20, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(kernels, "SECONDS", 0.01)
    monkeypatch.setattr(kernels, "KERNELS", {"wrong": lambda inputs: [lambda: 1.1 * inputs.exact()]})
    (row,) = kernels.measure(inputs, 1e9)
    assert row.error == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_weights_choose_the_same_tokens(dtype: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["agreement", "--model", "demo", "--device", "cpu", "--dtype", dtype])
    agreement.main()
    lines = capsys.readouterr().out.splitlines()
    certain, same = (int(word.strip(",")) for word in lines[2].split() if word.strip(",").isdigit())
    assert certain == same > agreement.PROMPTS * agreement.TOKENS // 4


def test_a_certain_choice_that_comes_out_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch):
    found = iter([torch.eye(50)[:8] * 10, torch.eye(50)[:8].roll(1, 1) * 10])
    monkeypatch.setattr(agreement, "logits_of", lambda loaded, tokens: next(found))
    monkeypatch.setattr(agreement, "CERTAIN", 0.5)
    monkeypatch.setattr(sys, "argv", ["agreement", "--model", "demo", "--device", "cpu"])
    with pytest.raises(SystemExit, match="otherwise"):
        agreement.main()


def test_what_runs_on_a_gpu_machine_needs_no_server():
    """Where nothing can be installed, flask and its kin are missing."""
    modules = ["kernels", "roofline", "peers", "agreement", "contenders.ours", "contenders.transformers_peer"]
    imports = ", ".join(f"benchmarks.{name}" for name in modules)
    unwanted = ("flask", "gunicorn", "dotenv", "requests", "matplotlib")
    program = f"import sys, {imports}; print([name for name in {unwanted} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
