"""A policy out of a file: by what name, what is wrong with one, and its parameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from batching.params import Params, number
from batching.policies import POLICIES
from batching.policies.dynamic import Dynamic
from batching.policy_file import FILES, make, mode_named, policies_in

MINE = """from batching.policies.dynamic import Dynamic

class Mine(Dynamic):
    pass
"""


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(POLICIES)
    yield
    POLICIES.clear()
    POLICIES.update(before)
    FILES.clear()


def written(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_files_policy_joins_the_modes_under_the_files_name_and_is_loaded_once(tmp_path: Path):
    path = written(tmp_path, MINE)
    assert mode_named(path) == "mine"
    cls = POLICIES["mine"]
    assert cls.__name__ == "Mine"
    assert mode_named(path) == "mine"
    assert POLICIES["mine"] is cls
    assert type(make("mine", {})) is cls
    assert {"mine": path} == FILES


def test_a_name_is_a_mode_as_it_was():
    assert mode_named("orca") == "orca"
    with pytest.raises(ValueError, match=r"there is no 'orka'; there are nobatch, static, .*files"):
        mode_named("orka")


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("", "mine.py", "defines no subclass of batching.policy.Policy"),
        ("import no_such_module\n", "mine.py", r"mine.py cannot be loaded: ModuleNotFoundError: .* \(mine.py, line 1\)"),
        ("\n\nx = 1 / 0\n", "mine.py", r"ZeroDivisionError: division by zero \(mine.py, line 3\)"),
        ("class Mine(\n", "mine.py", r"SyntaxError: .*mine.py, line 1"),
        ("import sys\nsys.exit(3)\n", "mine.py", r"SystemExit: 3 \(mine.py, line 2\)"),
        (MINE, "orca.py", "orca.py: there is a mode orca already"),
        (MINE + "\nclass Other(Dynamic): pass\n", "mine.py", "several policies, Mine, Other"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path: Path, text: str, name: str, told: str):
    with pytest.raises(ValueError, match=told):
        mode_named(written(tmp_path, text, name))
    assert "mine" not in POLICIES


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"nowhere/mine.py is not a Python file"):
        mode_named("/nowhere/mine.py")


def test_of_policies_that_are_made_from_each_other_the_last_one_counts(tmp_path: Path):
    (cls,) = policies_in(Path(written(tmp_path, MINE + "\nclass Better(Mine): pass\n")))
    assert cls.__name__ == "Better"


def test_a_file_whose_annotations_are_texts_has_whole_numbers_too(tmp_path: Path):
    text = f"""from __future__ import annotations
from dataclasses import dataclass
from batching.params import Params, number
{MINE}
@dataclass(frozen=True)
class MineParams(Params):
    new_per_step: int = number(3, 1, 10)

Mine.Params = MineParams
"""
    mode = mode_named(written(tmp_path, text))
    assert make(mode, {"new_per_step": "4"}).params.new_per_step == 4
    with pytest.raises(ValueError, match=r"new_per_step: must be a whole number, not 2\.5"):
        make(mode, {"new_per_step": "2.5"})


@pytest.mark.parametrize("raises", ["1 / 0", "raise SystemExit", "raise ValueError('no')", "raise MemoryError"])
def test_an_init_that_raises_is_an_error_with_its_place(tmp_path: Path, raises: str):
    mode = mode_named(written(tmp_path, MINE + f"    def __init__(self, params):\n        {raises}\n"))
    with pytest.raises(ValueError, match=r"mine cannot be made: .* \(mine.py, line 6\)"):
        make(mode, {})


@dataclass(frozen=True)
class Whole(Params):
    count: int = number(3, 1, 10)
    share: float = number(0.5, 0, 1)


class WithNumbers(Dynamic):
    Params = Whole


@pytest.mark.parametrize(("given", "count"), [(5, 5), ("5", 5), (5.0, 5), ("5.0", 5)])
def test_a_whole_number_is_one_whatever_way_it_comes(given: object, count: int):
    params = Whole.read({"count": given})
    assert params.count == count
    assert type(params.count) is int
    assert type(Whole.read({"share": 1}).share) is float


@pytest.mark.parametrize(
    "given",
    [2.5, "2.5", "inf", "nan", "1e400", True, None, [], 10**400, 10**5000, "x" * 1000],
    ids=lambda given: str(type(given).__name__),
)
def test_what_is_no_whole_number_is_refused_by_name(given: object):
    with pytest.raises(ValueError, match=r"^count: must (be a (whole )?number|lie between)") as caught:
        Whole.read({"count": given})
    assert len(str(caught.value)) < 200


def test_a_default_that_is_no_whole_number_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match=r"count: must be a whole number, not 2\.5"):
        Whole(count=2.5)  # type: ignore[arg-type]
