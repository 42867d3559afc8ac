"""What Chrome's Trace Event Format asks of a file, as checks: the fields of each kind of event, the order, and that slices of a
track lie inside one another or apart."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def read_trace(path: Path) -> list[Event]:
    """Its events, after all checks."""
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict), "the JSON object form"
    events: list[Event] = value["traceEvents"]
    for event in events:
        assert event["ph"] in "MXCbei", event
        assert isinstance(event["name"], str), event
        assert event["name"], event
        assert isinstance(event["pid"], int), event
        assert isinstance(event["tid"], int), event
        if event["ph"] != "M":
            assert math.isfinite(event["ts"]), event
            assert event["ts"] >= 0, event
        match event["ph"]:
            case "M":
                assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index"), event
                assert list(event["args"]) == [event["name"].partition("_")[2] if "sort" in event["name"] else "name"], event
            case "X":
                assert event["dur"] >= 0, event
                assert "args" in event, event
            case "C":
                assert all(isinstance(value, int | float) for value in event["args"].values()), event
            case "i":
                assert event["s"] == "t", event
            case _:
                assert isinstance(event["id"], str), event
                assert event["cat"], event
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    slices_nest(events)
    asynchronous_ones_are_closed(events)
    return events


def slices_nest(events: list[Event]) -> None:
    open_until: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in (event for event in events if event["ph"] == "X"):
        around = open_until[event["pid"], event["tid"]]
        while around and around[-1] <= event["ts"] + 0.002:
            around.pop()
        end = event["ts"] + event["dur"]
        assert not around or end <= around[-1] + 0.002, event
        around.append(end)


def asynchronous_ones_are_closed(events: list[Event]) -> None:
    under_way: dict[tuple[int, str, str], list[str]] = defaultdict(list)
    for event in (event for event in events if event["ph"] in "be"):
        names = under_way[event["pid"], event["cat"], event["id"]]
        if event["ph"] == "b":
            names.append(event["name"])
        else:
            assert names.pop() == event["name"], event
    assert not any(under_way.values())


def tracks(events: list[Event], pid: int = 1) -> dict[int, str]:
    """Names of a process's threads by their number."""
    return {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == pid}


def slices(events: list[Event], track: str, pid: int = 1) -> list[tuple[str, float, float]]:
    """(name, start, end) in seconds of the slices of a track, in their order."""
    (tid,) = (tid for tid, name in tracks(events, pid).items() if name == track)
    found = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (pid, tid)]
    return [(e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in found]
