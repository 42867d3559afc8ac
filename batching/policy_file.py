"""A policy out of a file of one's own, wherever it lies: `mine.py` beside the names of the modes that there are.

Its code runs when it is loaded, so a file is only ever named by whoever starts a program, never over HTTP.
"""

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batching.blame import in_a_line, place_of
from batching.policies import POLICIES
from batching.policy import Policy

FILES: dict[str, str] = {}  # of the modes that came out of one, by name


def mode_named(text: str) -> str:
    """The mode that `text` means: a name, or a policy's file, whose stem then is one. Raises ValueError."""
    if not text.endswith(".py"):
        if text not in POLICIES:
            raise ValueError(f"there is no {text!r}; there are {', '.join(POLICIES)}, and policies' files (mine.py)")
        return text
    path = Path(text).resolve()
    name = path.stem
    if FILES.get(name) == str(path):
        return name
    if name in POLICIES:
        raise ValueError(f"{path.name}: there is a mode {name} already: give the file another name")
    found = policies_in(path)
    if len(found) > 1:
        raise ValueError(f"{path.name} defines several policies, {', '.join(cls.__name__ for cls in found)}: one a file")
    POLICIES[name], FILES[name] = found[0], str(path)
    return name


def policies_in(path: Path) -> list[type[Policy]]:
    """The policies that a file defines itself, without those that others of them are made from. Raises ValueError."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    known = sys.modules.setdefault(spec.name, module) is not module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        if not known:
            del sys.modules[spec.name]
        raise ValueError(f"{path.name} cannot be loaded: {_told(error)}") from error
    found = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == spec.name]
    policies = [cls for cls in found if issubclass(cls, Policy)]
    if not policies:
        raise ValueError(f"{path.name} defines no subclass of batching.policy.Policy")
    return [cls for cls in policies if not any(other is not cls and issubclass(other, cls) for other in policies)]


def make(mode: str, arguments: Mapping[str, Any]) -> Policy:
    """Raises ValueError, naming the parameter, or the place in the policy's own code that raised something."""
    try:
        return POLICIES[mode].from_arguments(dict(arguments))
    except BaseException as error:
        if isinstance(error, ValueError) and place_of(error) is None:
            raise
        raise ValueError(f"{mode} cannot be made: {_told(error)}") from error


def _told(error: BaseException) -> str:
    place = place_of(error)
    return in_a_line(error) + (f" ({place})" if place else "")
