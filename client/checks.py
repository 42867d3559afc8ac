"""Whether a run is what its label says: answered in the mode and by the server that were asked for, and alone on it.

It must not know of HTTP, or of how it is shown. What a server does not tell, or a run of the simulator, is not doubted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from client.answers import ModeRun
from client.metrics import number

MARK = " !"  # behind the name of a mode whose figures are not what the name says


def label(run: ModeRun) -> str:
    """The mode's name, marked where there are doubts."""
    return run.mode + (MARK if doubts(run) else "")


def doubts(run: ModeRun) -> list[str]:
    """What makes a run's label wrong, a sentence each; nothing where all is as it was asked for."""
    return [] if run.simulated else [*_modes(run), *_instances(run), *_parameters(run), *_others(run)]


def answered_modes(run: ModeRun) -> Counter[str]:
    """The requests that were served, by the mode in which they were, as far as the server says so."""
    return Counter(answer.mode for answer in run.answers if not answer.error and answer.mode)


def _servers(run: ModeRun) -> dict[str, int]:
    """How many of the requests each server answered, those that answered only calls around the run included."""
    answers = Counter(answer.instance for answer in run.answers if answer.instance)
    return {name: answers[name] for name in dict.fromkeys([*answers, *run.instances])}


def _modes(run: ModeRun) -> Iterator[str]:
    modes = answered_modes(run)
    others = modes - Counter({run.mode: modes[run.mode]})
    if others:
        yield f"{others.total()} of {modes.total()} requests were answered in another mode ({_counted(others)})"
    for when, stats in (("before", run.before), ("after", run.stats)):
        if (mode := stats.get("mode", run.mode)) != run.mode:
            yield f"{when} the run the server was in mode {mode}"


def _instances(run: ModeRun) -> Iterator[str]:
    """Two servers behind one address, or one that was started anew."""
    servers = _servers(run)
    if len(servers) > 1:
        named = ", ".join(f"{name} ({count} of the requests)" for name, count in servers.items())
        figures = f"; the server's figures are {run.stats['instance']}'s alone" if run.stats.get("instance") else ""
        yield f"{len(servers)} servers answered, or one that was started anew: {named}{figures}"


def _parameters(run: ModeRun) -> Iterator[str]:
    for when, stats in (("before", run.before), ("after", run.stats)):
        params = stats.get("params")
        if stats.get("mode") == run.mode and run.params is not None and params is not None and params != run.params:
            yield f"{when} the run the mode's parameters were not those asked for: {_apart(run.params, params)}"
            return
    before, after = (number(stats, "policy_changes") for stats in (run.before, run.stats))
    if len(_servers(run)) <= 1 and before is not None and after is not None and before != after:
        times = "once" if after - before == 1 else f"{after - before:.0f} times"
        yield f"the policy was changed {times} during the run"


def _others(run: ModeRun) -> Iterator[str]:
    """Requests of other clients, or of earlier runs, in the server's figures."""
    before, after = (number(stats, "requests_finished") for stats in (run.before, run.stats))
    if before is None or after is None or len(_servers(run)) > 1:  # of two servers each counts its own
        return
    served = sum(not answer.error for answer in run.answers)
    what = "server TTFT, batch size, padding and preemptions"
    if after < served:
        yield f"somebody reset the statistics during the run: {what} are of {after:.0f} of the {served} requests"
    elif after > len(run.answers):
        yield f"{what} are of {after:.0f} requests, {after - served:.0f} of which are not this run's"


def _counted(modes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {mode}" for mode, count in modes.items())


def _apart(asked: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    names = [name for name in {**asked, **found} if asked.get(name) != found.get(name)]
    return ", ".join(f"{name} {found.get(name)} instead of {asked.get(name)}" for name in names)
