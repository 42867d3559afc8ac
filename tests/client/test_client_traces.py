"""Traces of other services: both public ones by their columns, times and lengths as they are, and what may be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from client.main import main
from client.shared.plan import read_plan
from client.traces import TraceError, TraceRow, read_trace, window

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
    path.write_bytes(text.encode())
    return path


def test_azures_columns_and_times_are_understood(tmp_path: Path) -> None:
    rows = read_trace(trace(tmp_path, AZURE))
    assert [(round(row.at_s, 3), row.prompt_tokens, row.output_tokens) for row in rows] == [
        (0.0, 374, 44),
        (4.315, 396, 109),
        (4.542, 879, 55),
    ]


def test_burstgpts_columns_are_understood_and_its_failed_requests_left_out(tmp_path: Path) -> None:
    rows = read_trace(trace(tmp_path, BURSTGPT))
    assert window(rows, 0, math.inf, 100) == ([TraceRow(0.0, 472, 18), TraceRow(40.0, 1087, 230)], 1)


def test_a_list_and_lines_of_json_say_the_same_as_csv(tmp_path: Path) -> None:
    records = [
        {"timestamp": 3.5, "prompt_tokens": 7, "output_tokens": 2},
        {"timestamp": 1, "prompt_tokens": 5, "output_tokens": 9},
    ]
    expected = [TraceRow(0.0, 5, 9), TraceRow(2.5, 7, 2)]
    assert read_trace(trace(tmp_path, json.dumps(records), "a.json")) == expected
    assert read_trace(trace(tmp_path, "\n".join(map(json.dumps, records)), "a.jsonl")) == expected


def test_azures_offset_and_an_iso_time_are_understood(tmp_path: Path) -> None:
    rows = read_trace(
        trace(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:01.5+00:00,1,1\n2024-05-10T00:00:00Z,1,1\n")
    )
    assert [row.at_s for row in rows] == [0.0, 1.5]


@pytest.mark.parametrize(
    "text",
    [
        '{"timestamp": 27000, "input_length": 6755, "output_length": 500, "hash_ids": [46, 47]}\n'
        '{"timestamp": 30500, "input_length": 7319, "output_length": 490, "hash_ids": [46]}\n',
        "arrived_at,num_prefill_tokens,num_decode_tokens\n27.0,6755,500\n30.5,7319,490\n",
        "request_id,arrival_timestamp,prompt_size,token_size\n0,27.0,6755,500\n1,30.5,7319,490\n",
    ],
    ids=["mooncake, in milliseconds", "vidur", "splitwise"],
)
def test_other_public_traces_say_the_same_in_their_columns(text: str, tmp_path: Path) -> None:
    assert read_trace(trace(tmp_path, text)) == [TraceRow(0.0, 6755, 500), TraceRow(3.5, 7319, 490)]


ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_and_not_at_what_else_unicode_calls_an_end(tmp_path: Path, end: str) -> None:
    expected = [TraceRow(0.0, 5, 9), TraceRow(1.0, 7, 2)]
    records = [
        {"timestamp": 1 + row.at_s, "prompt_tokens": row.prompt_tokens, "output_tokens": row.output_tokens} for row in expected
    ]
    text = "".join(character for character in ODD if ord(character) >= 32)  # what JSON may hold as it is
    raw = [json.dumps(record | {"text": text}, ensure_ascii=False) for record in records]
    assert read_trace(trace(tmp_path, end.join(raw) + end, "a.jsonl")) == expected
    head = f"timestamp,note,prompt_tokens,output_tokens{end}"
    plain = head + f"1,{ODD},5,9{end}2,,7,2{end}"
    quoted = head + f'1,"{ODD}{end}and, more",5,9{end}2,,7,2{end}'
    assert read_trace(trace(tmp_path, plain)) == expected
    assert read_trace(trace(tmp_path, "\ufeff" + quoted)) == expected


def test_a_window_of_a_trace_counts_from_its_first_request_and_what_it_left_out_itself(tmp_path: Path) -> None:
    minutes = [(0, 1), (50, 0), (70, 2), (80, 0), (90, 3), (130, 0), (190, 4)]  # when, and prompt tokens
    rows = read_trace(trace(tmp_path, "at_s,prompt_tokens,output_tokens\n" + "".join(f"{60 * m},{n},1\n" for m, n in minutes)))
    used, left_out = window(rows, 1, 2, math.inf)
    assert ([(row.at_s / 60, row.prompt_tokens) for row in used], left_out) == ([(0, 2), (20, 3)], 2)
    used, left_out = window(rows, 0, math.inf, 2)
    assert ([row.prompt_tokens for row in used], left_out) == ([1, 2], 1), "of the rows that were used"
    with pytest.raises(TraceError, match=r"2 h to 3 h: has no request with a prompt and an output; the trace lasts 3\.17 h"):
        window(rows, 2, 1, 2)


def planned(tmp_path: Path, *flags: str) -> list[float]:
    assert main([*flags, "--plan-only", "--out", str(tmp_path)]) == 0
    return [request.at_s for request in read_plan(tmp_path / "plan.json").requests]


def test_a_window_and_a_rate_are_flags_and_the_note_says_how_long_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"{30 * i},{0 if i == 3 else 5},1\n" for i in range(1000))
    flags = ["--trace", str(trace(tmp_path, "at_s,prompt_tokens,output_tokens\n" + rows))]
    assert planned(tmp_path, *flags, "--trace-from", "1", "--trace-hours", "2") == [30 * i for i in range(240)]
    assert "note: sending takes 120 min in each mode" in capsys.readouterr().err
    assert len(planned(tmp_path, *flags, "--trace-hours", "2", "--numsamples", "7")) == 7
    assert "note: 1 of 8 rows of the trace were left out" in capsys.readouterr().err
    assert planned(tmp_path, *flags, "--trace-from", "1", "--rate", "2")[:3] == [0, 0.5, 1]
    shown = capsys.readouterr()
    assert "note: sending takes 50 s in each mode" in shown.err
    assert "60 times as fast" in shown.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trace-from", "1"], "--trace-from goes with --trace"),
        (["--trace", "x", "--rate", "2", "--speed", "3"], "--speed cannot go with --rate"),
        (["--trace", "x", "--duration", "2"], "--duration cannot go with --trace"),
        (["--rate", "2"], "--rate goes with --arrivals or --trace"),
        (["--trace", "x", "--trace-hours", "0"], "--trace-hours"),
    ],
)
def test_flags_of_a_trace_that_do_not_go_together_are_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--plan-only"])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_rate_for_requests_that_all_come_at_once_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trace(tmp_path, "at_s,prompt_tokens,output_tokens\n1,1,1\n1,2,2\n")
    assert main(["--trace", str(path), "--rate", "2", "--plan-only", "--out", str(tmp_path)]) == 2
    assert "--rate: the requests of the trace all come at once" in capsys.readouterr().err


AZURE_2023 = Path(__file__).parents[3] / "shared" / "oracles" / "vidur" / "azure-conv-2023.csv"


@pytest.mark.skipif(not AZURE_2023.exists(), reason="Azure's conversation trace of 2023 does not lie beside the checkout")
def test_azures_hour_of_conversations_is_read_whole(tmp_path: Path) -> None:
    rows = read_trace(AZURE_2023)
    assert len(rows) == 19366
    assert rows[-1].at_s == pytest.approx(3501.7, abs=0.1)
    assert len(planned(tmp_path, "--trace", str(AZURE_2023), "--trace-from", "0.5", "--trace-hours", "0.1")) > 500


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
        (BURSTGPT.replace("Request tokens", "Tokens"), ["there are timestamp, model, tokens, response tokens"]),
        (AZURE.replace("396", "3\r96"), ["line 3", "CSV"]),
        (AZURE.replace("396", "9" * 200_000), ["line 3", "CSV"]),
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
