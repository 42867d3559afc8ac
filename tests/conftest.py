"""Options and fixtures that several rooms share."""

import importlib.util
import inspect
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"

from batching.policies import POLICIES
from batching.policy import Policy


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--policy", action="append", default=[], help="a file with a policy of your own, for tests/policies")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "policy_class" in metafunc.fixturenames:
        for path in metafunc.config.getoption("--policy"):
            if not Path(path).is_file():
                raise pytest.UsageError(f"--policy {path}: no such file")
        own = [cls for path in metafunc.config.getoption("--policy") for cls in _policies_in(Path(path))]
        classes = own or list(POLICIES.values())
        metafunc.parametrize("policy_class", classes, ids=[cls.__name__ for cls in classes])


def _policies_in(path: Path) -> list[type[Policy]]:
    """The policies that a file defines itself."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, f"{path} is not a Python file"
    assert spec.loader is not None, f"{path} is not a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == path.stem]
    policies = [cls for cls in found if issubclass(cls, Policy)]
    assert policies, f"{path} defines no subclass of batching.policy.Policy"
    return policies
