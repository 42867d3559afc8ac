"""The policy of docs/your-own-policy.md: what the page says about it is true."""

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from batching.policies import POLICIES
from batching.policy import Limits, Policy, RequestView, View
from batching.request import Request
from simulator.__main__ import main
from simulator.virtual import simulate

PAGE = Path(__file__).parents[2] / "docs" / "your-own-policy.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [text for language, text in BLOCKS if language == "bash"]
OUTPUTS = [text for language, text in BLOCKS if not language]


@pytest.fixture
def shortest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Policy]:
    """The page's class, out of a file `mine.py` as on the page."""
    (tmp_path / "mine.py").write_text(PROGRAMS[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    import mine

    return mine.ShortestFirst


def test_the_pages_example_prints_what_the_page_says(shortest_first: type[Policy], capsys: pytest.CaptureFixture[str]):
    exec(compile(PROGRAMS[1], str(PAGE), "exec"), {})
    assert capsys.readouterr().out in OUTPUTS


def test_the_pages_simulation_gives_the_times_on_the_page(
    shortest_first: type[Policy], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(POLICIES, "shortest", shortest_first)
    (command,) = (text for text in COMMANDS if "simulator run" in text)
    assert main(shlex.split(command.replace("\\\n", " "))[3:]) == 0
    _overview, times = capsys.readouterr().out.split("TTFT s")
    (shown,) = (text for text in OUTPUTS if "TTFT s" in text and "E2EL s" in text)
    for mode in ("orca", "shortest", "dynamic"):
        of_mode = rf"^{mode} .*$"
        told, printed = (re.search(of_mode, text, re.MULTILINE)[0].split() for text in (shown, times))
        assert told == printed[:5] + printed[-4:]  # TPOT and ITL are left out


def test_who_has_waited_for_its_patience_goes_first_whatever_it_asks_for(shortest_first: type[Policy]):
    requests = [Request("long", [0], 8), *(Request(f"short {i}", [0], 2, arrival=2.0 * i) for i in range(10))]
    answered = simulate(shortest_first.from_arguments({"patience_s": 10}), Limits(max_batch_size=1), requests)
    assert [req.id for req in answered][:7] == [*(f"short {i}" for i in range(5)), "long", "short 5"]


def test_its_parameter_is_checked(shortest_first: type[Policy]):
    with pytest.raises(ValueError, match="patience_s: must lie between 0 and 3600, not -1"):
        shortest_first.from_arguments({"patience_s": "-1"})


def test_the_page_names_all_that_can_be_read():
    seen = [name for name in vars(RequestView) if not name.startswith("_")]
    limits = [field.name for field in fields(Limits)]
    for name in (*seen, *View._fields, "step_time", *limits):
        assert re.search(rf"`{name}[`(]", PAGE.read_text()), name
