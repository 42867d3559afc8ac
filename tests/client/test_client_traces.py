"""Traces of other services: both public ones by their columns, times and lengths as they are, and what may be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.main import main
from client.shared.plan import read_plan
from client.traces import TraceError, TraceRow, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225670,879,55
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
45.5,GPT-4,417,0,417,Conversation log
"""


def trace(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_azures_columns_and_times_are_understood(tmp_path: Path) -> None:
    rows, left_out = read_trace(trace(tmp_path, AZURE))
    assert [(round(row.at_s, 3), row.prompt_tokens, row.output_tokens) for row in rows] == [
        (0.0, 374, 44),
        (4.315, 396, 109),
        (4.542, 879, 55),
    ]
    assert left_out == 0


def test_burstgpts_columns_are_understood_and_its_failed_requests_left_out(tmp_path: Path) -> None:
    assert read_trace(trace(tmp_path, BURSTGPT)) == ([TraceRow(0.0, 472, 18), TraceRow(40.0, 1087, 230)], 1)


def test_a_list_and_lines_of_json_say_the_same_as_csv(tmp_path: Path) -> None:
    records = [
        {"timestamp": 3.5, "prompt_tokens": 7, "output_tokens": 2},
        {"timestamp": 1, "prompt_tokens": 5, "output_tokens": 9},
    ]
    expected = ([TraceRow(0.0, 5, 9), TraceRow(2.5, 7, 2)], 0)
    assert read_trace(trace(tmp_path, json.dumps(records), "a.json")) == expected
    assert read_trace(trace(tmp_path, "\n".join(map(json.dumps, records)), "a.jsonl")) == expected


def test_azures_offset_and_an_iso_time_are_understood(tmp_path: Path) -> None:
    rows, _ = read_trace(
        trace(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:01.5+00:00,1,1\n2024-05-10T00:00:00Z,1,1\n")
    )
    assert [row.at_s for row in rows] == [0.0, 1.5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (AZURE.replace("396", "many"), ["line 3", "ContextTokens", "many"]),
        (AZURE.replace("109", "10.5"), ["line 3", "GeneratedTokens", "10.5"]),
        (AZURE.replace("879,55", "879"), ["line 4", "GeneratedTokens", "None"]),
        (AZURE.replace("2023-11-16 18:15:50.9951690", "yesterday"), ["line 3", "TIMESTAMP", "yesterday"]),
        (AZURE.replace("44", "-44"), ["line 2", "GeneratedTokens"]),
        (BURSTGPT.replace("Request tokens", "Tokens"), ["line 2", "prompt", "request tokens"]),
        ('[{"timestamp": 1, "prompt_tokens": 5, "output_tokens": 9}, 3]', ["element 2", "object"]),
        ('{"timestamp": 1, "prompt_tokens": 5, "output_tokens": 9}\n{"timestamp"', ["line 2", "JSON"]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", ["has no request"]),
        ("", ["has no request"]),
    ],
)
def test_a_malformed_trace_is_one_line_with_its_place_and_column(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", str(trace(tmp_path, text)), "--plan-only", "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert all(word in shown for word in ["trace.csv", *words])


def test_a_trace_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.csv: No such file"):
        read_trace(tmp_path / "none.csv")


def test_a_replayed_trace_is_cut_to_the_context_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trace", str(trace(tmp_path, AZURE)), "--speed", "2", "--context", "512", "--plan-only", "--out", str(tmp_path)]
    assert main(flags) == 0
    assert "1 of 3 requests were cut to fit a context of 512 tokens" in capsys.readouterr().err
    plan = read_plan(tmp_path / "plan.json")
    assert [(r.prompt_tokens, r.num_tokens) for r in plan.requests] == [(374, 44), (396, 109), (457, 55)]
    assert plan.requests[1].at_s == pytest.approx(4.314579 / 2)
    assert all(len(request.prompt.split()) == request.prompt_tokens for request in plan.requests)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_numsamples_takes_the_first_rows_of_a_trace(tmp_path: Path) -> None:
    main(["--trace", str(trace(tmp_path, AZURE)), "--numsamples", "2", "--plan-only", "--out", str(tmp_path)])
    assert [request.num_tokens for request in read_plan(tmp_path / "plan.json").requests] == [44, 109]
