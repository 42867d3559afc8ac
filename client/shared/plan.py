"""The plan of a run, which request is sent when, and its file: plain JSON that the client writes and the simulator reads too.

It must not know how plans are drawn or sent.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

PRIORITIES = ("immediate", "deferred")
FORMAT = 1  # of the file
LARGEST = 10**6  # of tokens, and of users


class PlanError(ValueError):
    """A file that is no plan; the message names the file and the field."""


@dataclass(frozen=True)
class PlannedRequest:
    """One request of the plan; ``at_s`` counts from the start of the run. In a closed loop it is 0 until the request's turn
    comes. ``prompt_tokens`` is None where the prompt was not made to a length."""

    index: int
    at_s: float
    prompt: str
    num_tokens: int
    priority: str
    seed: int
    prompt_tokens: int | None = None

    def body(self) -> dict[str, str | int]:
        """The JSON body of its POST /inference; its own seed makes the text the same in every mode."""
        return {
            "prompt": self.prompt,
            "num_tokens": self.num_tokens,
            "priority": self.priority,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Plan:
    """``users``: None in an open loop; else how many requests are under way at a time. ``made`` says in words what it was drawn
    from, ``notes`` what had to be changed."""

    requests: tuple[PlannedRequest, ...]
    users: int | None = None
    made: str = ""
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """From the start to the last planned send."""
        return max((request.at_s for request in self.requests), default=0.0)


# ---- the file


def write_plan(path: Path, plan: Plan) -> None:
    """Plain JSON, a request a line."""
    head = {"plan": FORMAT, "made": plan.made, "notes": plan.notes, "users": plan.users}
    lines = [json.dumps({key: value for key, value in asdict(request).items() if key != "index"}) for request in plan.requests]
    text = json.dumps(head)[:-1] + ', "requests": [\n' + ",\n".join(lines) + "\n]}\n"
    path.write_text(text, encoding="utf-8")


def read_plan(path: Path) -> Plan:
    """A plan that was written, or made by other means. Raises PlanError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: is not JSON: {error}") from None
    listed = value.get("requests") if isinstance(value, dict) else None
    if not isinstance(listed, list) or not listed or value.get("plan") != FORMAT:
        raise PlanError(f'{path}: is no plan: it must be an object with "plan": {FORMAT} and a list of "requests"')
    users = value.get("users")
    if users is not None and not _whole(users, 1):
        raise PlanError(f"{path}: users must be null or a whole number of at least 1, not {users!r}")
    found = [_read_request(f"{path}, request {number}", entry) for number, entry in enumerate(listed, 1)]
    ordered = sorted(found, key=lambda request: request.at_s)
    requests = tuple(replace(request, index=index) for index, request in enumerate(ordered))
    notes = value.get("notes")
    return Plan(requests, users, str(value.get("made") or ""), tuple(map(str, notes)) if isinstance(notes, list) else ())


def _read_request(place: str, entry: Any) -> PlannedRequest:
    if not isinstance(entry, dict):
        raise PlanError(f"{place}: must be an object, not {type(entry).__name__}")

    def check(name: str, good: bool, told: str) -> None:
        if not good:
            raise PlanError(f"{place}: {name} must be {told}, not {str(entry.get(name))[:60]!r}")

    at_s: Any = entry.get("at_s")
    prompt: Any = entry.get("prompt")
    length: Any = entry.get("prompt_tokens")
    number = isinstance(at_s, int | float) and not isinstance(at_s, bool)
    check("at_s", number and 0 <= at_s < math.inf, "a number of seconds from 0 on")
    check("prompt", isinstance(prompt, str) and bool(prompt), "a text")
    check("num_tokens", _whole(entry.get("num_tokens"), 1), f"a whole number from 1 to {LARGEST}")
    check("priority", entry.get("priority") in PRIORITIES, " or ".join(PRIORITIES))
    seed: Any = entry.get("seed", 0)  # the simulator draws nothing from it
    check("seed", _whole(seed, 0, math.inf), "a whole number from 0 on")
    check("prompt_tokens", length is None or _whole(length, 1), f"null or a whole number from 1 to {LARGEST}")
    return PlannedRequest(0, float(at_s), prompt, entry["num_tokens"], entry["priority"], seed, length)


def _whole(value: Any, least: int, most: float = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
