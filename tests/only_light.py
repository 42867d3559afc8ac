"""`python -m tests.only_light MODULE-OR-FILE arguments...` runs it as on a laptop that has the repository and what
requirements-light.txt brings, and nothing else.
"""

import runpy
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement  # pytest needs it

ROOT = Path(__file__).parents[1]


def requirements(path: Path) -> Iterator[Requirement]:
    for line in path.read_text(encoding="utf-8").splitlines():
        wanted = line.partition("#")[0].strip()
        if wanted.startswith("-r "):
            yield from requirements(path.parent / wanted[3:])
        elif wanted:
            yield Requirement(wanted)


def with_dependencies(wanted: Iterator[Requirement]) -> set[str]:
    """The names of all distributions that pip installs for `wanted`."""
    found: set[str] = set()
    left = list(wanted)
    while left:
        one = left.pop()
        name = one.name.lower().replace("_", "-")
        if name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found.add(name)
            try:
                left += map(Requirement, requires(name) or [])
            except PackageNotFoundError:  # for another Python or system
                continue
    return found


class Finder(MetaPathFinder):
    """Finds what the others do, but for what another requirements file brought."""

    def __init__(self, others: list[Any]) -> None:
        self._others = others
        there = with_dependencies(requirements(ROOT / "requirements-light.txt"))
        self._not_there = {
            module
            for module, distributions in packages_distributions().items()
            if there.isdisjoint(name.lower().replace("_", "-") for name in distributions)
        }

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] in self._not_there:
            return None
        return next(filter(None, (finder.find_spec(name, path, target) for finder in self._others)), None)


if __name__ == "__main__":
    sys.meta_path[:] = [Finder(list(sys.meta_path))]
    del sys.argv[0]
    program = sys.argv[0]
    if program.endswith(".py"):
        sys.path[0] = str(Path(program).resolve().parent)
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
