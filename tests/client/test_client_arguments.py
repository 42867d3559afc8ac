"""Refused arguments, and where the address and the key come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from client import arguments
from client.arguments import parse_arguments, read_workloads


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("--numsamples 0", "--numsamples"),
        ("--numsamples two", "--numsamples"),
        ("--wait -1", "--wait"),
        ("--wait nan", "--wait"),
        ("--wait inf", "--wait"),
        ("--numtokens_range 25 0", "--numtokens_range"),
        ("--selection ascend", "--selection"),
        ("--deferred 1.5", "--deferred"),
        ("--deferred nan", "--deferred"),
        ("--modes static,,mixed", "--modes"),
        ("--modes static,static", "--modes"),
        ("--seed x", "--seed"),
        ("--prompt Once", "--numtokens"),
        ("--numtokens 5", "--prompt"),
        ("--prompt Once --numtokens 0", "--numtokens"),
        ("--prompt Once --numtokens 5 --modes static", "--modes"),
        ("--prompt Once --numtokens 5 --deferred 1", "--deferred"),
        ("--url localhost:8500", "localhost:8500"),
        ("--url http://localhost:port", "localhost:port"),
        ("--mode static", "--mode"),
        ("--arrivals pareto", "pareto"),
        ("--arrivals low --wait 1", "--wait"),
        ("--rate 5", "--arrivals"),
        ("--arrivals low low", "--arrivals"),
        ("--arrivals low --rate 0", "--rate"),
        ("--arrivals low --rate 5 --duration 5", "--duration"),
        ("--arrivals low --bins 0", "--bins"),
        ("--arrivals low --bins 1000000", "--bins"),
        ("--users 0", "--users"),
        ("--users 3 --arrivals low", "--arrivals"),
        ("--users 3 --trace t.csv", "--trace"),
        ("--trace t.csv --rate 3 --arrivals low", "--arrivals"),
        ("--speed 2", "--trace"),
        ("--plan p.json --numsamples 5", "--numsamples"),
        ("--plan p.json --seed=5", "--seed"),
        ("--output-lengths geometric", "geometric"),
        ("--output-lengths fixed:tokens=5 --numtokens_range 5", "--numtokens_range"),
        ("--prompt-lengths fixed:tokens=0", "tokens"),
        ("--goodput itl:1", "itl"),
        ("--goodput ttft", "ttft"),
        ("--goodput ttft:0", "0"),
        ("--goodput ttft:1 --no-stream", "--no-stream"),
        ("--prompt Once --numtokens 5 --report r", "--report"),
    ],
)
def test_a_bad_argument_is_one_line_naming_it_and_exit_2(line: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(line.split())
    shown = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert shown.count("\n") == 1
    assert word in shown


def test_the_defaults_are_those_of_the_original_project() -> None:
    args = parse_arguments([])
    assert (read_workloads(args)[""].count, args.wait, read_workloads(args)[""].output_lengths) == (100, 1.0, (1, 25, 50, 100))
    assert (args.selection, args.deferred, args.modes, args.seed) == ("random", 0.0, None, 0)
    assert (args.url, args.api_key) == ("http://127.0.0.1:8500", "")


def test_ip_and_key_come_from_the_env_file() -> None:
    arguments.ENV_FILE.write_text("IP=10.0.0.5\nAPI_KEY='from the file'\n")
    args = parse_arguments([])
    assert (args.url, args.api_key) == ("http://10.0.0.5:8500", "from the file")


def test_the_environment_wins_over_the_env_file(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments.ENV_FILE.write_text("IP=10.0.0.5\nAPI_KEY=file\n")
    monkeypatch.setenv("API_KEY", "environment")
    args = parse_arguments([])
    assert (args.url, args.api_key) == ("http://10.0.0.5:8500", "environment")


def test_the_url_flag_wins_over_ip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IP", "10.0.0.5")
    assert parse_arguments(["--url", "https://lab.example/batch"]).url == "https://lab.example/batch"


def test_a_key_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "schlüssel")
    with pytest.raises(SystemExit):
        parse_arguments([])


def test_modes_may_have_spaces_after_the_commas() -> None:
    assert parse_arguments(["--modes", "nobatch, static"]).modes == ["nobatch", "static"]


def test_the_example_env_file_names_what_is_read() -> None:
    example = Path(arguments.__file__).with_name(".env.example").read_text(encoding="utf-8")
    assert "IP=" in example
    assert "API_KEY=" in example


@pytest.mark.parametrize(
    ("line", "stream"),
    [
        ("", False),
        ("--stream", True),
        ("--report r", True),
        ("--report r --no-stream", False),
        ("--goodput ttft:1", True),
        ("--goodput e2el:1", False),
    ],
)
def test_answers_are_streamed_where_their_first_tokens_time_is_asked_for(line: str, stream: bool) -> None:
    assert parse_arguments(line.split()).stream is stream
