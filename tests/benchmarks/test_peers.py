"""The comparison with other servers: its workload, its ratios, and a run with a tiny model."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contenders import ours
from benchmarks.contenders.checkpoint import merges, vocabulary
from benchmarks.contenders.contender import Contender, Session
from benchmarks.contenders.table import Row, ratios, table
from benchmarks.contenders.turn import Done, Turn, serve
from benchmarks.peers import write_runs
from benchmarks.workload import VOCAB_SIZE, all_at_once, one_at_a_time

ROOT = Path(__file__).parents[2]


def row(name: str, dtype: str, *speeds: tuple[float, float], first_token: int = 7, note: str = "") -> Row:
    """Made-up runs, each with a speed at W1 and at W2."""
    first = (first_token, 8)
    turns = [Turn(dtype, Done(100, 100 / w1, first), Done(100, 100 / w2, first)) for w1, w2 in speeds]
    return Row(Contender(name, dtype, ours), turns, note)


ROWS = [
    row("ours", "bf16", (300, 30), (400, 20)),
    row("ours", "int8", (600, 80), first_token=6),
    row("ours default", "bf16", (380, 30)),
    row("transformers continuous", "fp32", (500, 10)),
    row("CTranslate2", "bf16", note="not installed: ctranslate2"),
    row("llama.cpp 64 slots", "BF16", (100, 25)),
    row("llama.cpp 32 slots", "BF16", (200, 24)),
    row("effective-batching", "fp32", (4, 5)),
]


def test_the_workload_is_64_seeded_requests_of_16_to_128_tokens_in_and_out() -> None:
    jobs = all_at_once()
    assert jobs == all_at_once() != all_at_once(seed=1)
    assert len(jobs) == 64
    assert {16 <= len(prompt) <= 128 and 16 <= length <= 128 for prompt, length in jobs} == {True}
    assert all(0 <= token < VOCAB_SIZE for prompt, _ in jobs for token in prompt)
    assert one_at_a_time() == jobs[:8]


def test_every_token_of_the_vocabulary_is_another_one_and_can_be_merged_from_two() -> None:
    tokens = vocabulary()
    known = set(tokens)
    assert len(tokens) == len(known) == VOCAB_SIZE
    assert all(set(line.split()) <= known for line in merges(tokens))


def test_a_ratio_is_of_the_best_runs_and_names_the_best_peer() -> None:
    found = {title: (ratio, against) for title, ratio, against in ratios(ROWS)}
    assert found["W1: ours bf16 / best 16-bit peer"] == (pytest.approx(2), "llama.cpp 32 slots BF16")
    assert found["W1: ours default / best peer of any dtype"] == (pytest.approx(0.76), "transformers continuous fp32")
    assert found["W2: ours bf16 / llama.cpp BF16"] == (pytest.approx(1.2), "llama.cpp 64 slots BF16")
    assert found["ours bf16: dynamic (W1) / nobatch (W2)"] == (pytest.approx(400 / 30), "")
    assert found["W1: ours default / effective-batching"] == (pytest.approx(95), "")


def test_a_ratio_without_a_peer_says_so() -> None:
    found = {title: (ratio, against) for title, ratio, against in ratios(ROWS)}
    assert found["W1: ours int8 / best 8-bit peer"] == (None, "no peer")
    assert found["W1: ours fp32 / effective-batching"] == (None, "not measured")


def test_the_table_shows_why_a_row_is_empty_and_which_rows_compute_something_else() -> None:
    lines = {tuple(line.split()[:2]): line.split() for line in table(ROWS).splitlines() if line}
    assert lines["CTranslate2", "bf16"][2:] == ["-", "-", "-", "not", "installed:", "ctranslate2"]
    assert lines["ours", "bf16"][2:] == ["400.0", "30.0", "2/2"]
    assert lines["ours", "int8"][2:] == ["600.0", "80.0", "1/2"]


def test_the_csv_has_a_line_for_every_run_and_every_note(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs.csv", ROWS)
    with (tmp_path / "runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * sum(len(row.turns) for row in ROWS) + 1
    assert lines[2] | {"seconds": ""} == {
        "contender": "ours",
        "dtype": "bf16",
        "workload": "W1",
        "run": "2",
        "tokens": "100",
        "seconds": "",
        "tokens_per_s": "400.00",
        "note": "",
    }


def test_too_few_tokens_are_no_result() -> None:
    class Lazy(Session):
        def serve(self, jobs):
            return [[1] * (length - 1) for _, length in jobs]

    with pytest.raises(RuntimeError, match="instead of"):
        serve(Lazy(), [all_at_once()])


def test_a_tiny_run_measures_who_is_here_and_says_who_is_not(tmp_path: Path) -> None:
    flags = ["--tiny", "--repeat", "1", "--work", str(tmp_path), "--csv", str(tmp_path / "runs.csv")]
    only = "ours fp32,continuous fp32,effective,CTranslate2 fp32,64 slots BF16"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *flags, "--only", only],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = {line[:24].strip(): line[24:].split() for line in done.stdout.partition("\n\n")[0].splitlines()[2:]}
    assert list(rows) == [
        "ours",
        "transformers continuous",
        "CTranslate2",
        "llama.cpp 64 slots",
        "effective-batching",
    ]
    for name in ("ours", "transformers continuous", "effective-batching"):
        assert rows[name][3] == "64/64", done.stdout
    assert rows["CTranslate2"][3] == "64/64" or rows["CTranslate2"][4:] == ["not", "installed:", "ctranslate2"]
    assert "--llama-server" in rows["llama.cpp 64 slots"] or "gguf" in rows["llama.cpp 64 slots"]
