"""Options and fixtures that several rooms share. Needs neither torch nor a server: the rooms of a student's laptop (policies,
batching, simulator, client) are tested without.

Quick by default: a property test tries QUICK examples, and tests marked `thorough` are left out; the last lines of a run say
so. `--thorough` leaves nothing out.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import is_hypothesis_test, settings

from batching.policies import POLICIES
from batching.policy_file import policies_in

QUICK, THOROUGH = 25, 300  # examples of a property test; one that needs a number of its own takes a multiple
LEFT_OUT = pytest.StashKey[dict[str, Any]]()

settings.register_profile("quick", max_examples=QUICK, deadline=None)
settings.register_profile("thorough", max_examples=THOROUGH, deadline=None)

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported: several processes share the cores
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--policy", action="append", default=[], help="a file with a policy of your own, for tests/policies")
    parser.addoption("--thorough", action="store_true", help=f"leave nothing out, {THOROUGH} examples of each property")


def pytest_configure(config: pytest.Config) -> None:
    thorough = config.option.thorough or config.option.policy  # nobody else tries a policy that is new
    settings.load_profile("thorough" if thorough else "quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `thorough`, unless a test is asked for by its name."""
    if config.option.thorough or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    hastened = items if settings.default.max_examples == QUICK else []
    properties = sum(is_hypothesis_test(getattr(item, "obj", None)) for item in hastened)
    config.stash[LEFT_OUT] = {"tests": [item.nodeid for item in left_out], "properties": properties}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several workers: each has collected the same
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if left_out := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[LEFT_OUT] = left_out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, {"tests": [], "properties": 0})
    lines = [f"{len(left_out['tests'])} tests: {', '.join(left_out['tests'])}"] if left_out["tests"] else []
    if left_out["properties"]:
        lines.append(f"{left_out['properties']} property tests tried {QUICK} examples, not {THOROUGH}")
    if lines:
        terminalreporter.section("left out for speed; --thorough has it all")
        for line in lines:
            terminalreporter.write_line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "policy_class" in metafunc.fixturenames:
        try:
            own = [cls for path in metafunc.config.getoption("--policy") for cls in policies_in(Path(path))]
        except ValueError as error:
            raise pytest.UsageError(f"--policy: {error}") from None
        classes = own or list(POLICIES.values())
        metafunc.parametrize("policy_class", classes, ids=[cls.__name__ for cls in classes])
