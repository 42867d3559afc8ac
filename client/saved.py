"""Runs that were written to results.json, read again: the client's own, or the simulator's, which writes the same format.

It must not know of HTTP or pictures. What report.py writes and this reads belong together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from client.answers import Answer, ModeRun, Stream, one_of_each_mode
from client.shared import schema
from client.shared.plan import Plan, PlannedRequest


class ResultsError(ValueError):
    """A file that holds no results; the message names it."""


def read_results(path: Path) -> tuple[str, Stream]:
    """What they are about, and the plan with its runs. Raises ResultsError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict) or "modes" not in value:
            raise ValueError('it must be an object with "modes"')
        schema.check(value.get("schema"), schema.RESULTS, "results")
        runs = [_run(mode) for mode in value["modes"]]
        runs = one_of_each_mode(runs)
        requests = {answer.request.index: answer.request for run in runs for answer in run.answers}
        plan = Plan(tuple(requests[index] for index in sorted(requests)), made=str(value["plan"]))
        about = str(value["about"])
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from None
    except schema.SchemaError as error:
        raise ResultsError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ResultsError(f"{path}: is no results.json: {type(error).__name__}: {error}") from None
    if not requests:
        raise ResultsError(f"{path}: has no answers")
    return about, Stream("", plan, runs)


def _run(mode: dict[str, Any]) -> ModeRun:
    answers = [_answer(row) for row in mode["answers"]]
    run = ModeRun(str(mode["mode"]), answers, dict(mode["server_stats"]), mode["steps"], int(mode["slots"]))
    run.params, run.before = mode.get("params"), dict(mode.get("server_stats_before") or {})
    run.repeat = int(mode["repeat"])
    run.instances = list(mode.get("instances") or ())
    if run.simulated:  # which writes no answer for what it refused
        run.unserved = {str(kind): int(count) for kind, count in mode["groups"]["all"]["errors"].items()}
    return run


def _answer(row: dict[str, Any]) -> Answer:
    request = PlannedRequest(
        index=int(row["request"]),
        at_s=float(row["planned_s"]),
        prompt=row["prompt"],
        num_tokens=int(row["requested_tokens"]),
        priority=row["priority"],
        seed=int(row["seed"]),
        prompt_tokens=row["prompt_tokens"],
    )
    return Answer(
        request,
        sent_s=float(row["sent_s"]),
        done_s=float(row["answered_s"]),
        error="" if row["status"] == "ok" else str(row["status"]),
        message=row["message"],
        tokens=int(row["output_tokens"] or 0),
        prompt_tokens=row["prompt_tokens"],
        completion=row["completion"],
        finish_reason=row["finish_reason"],
        piece_times=tuple(map(float, row["piece_times_s"])),
        server_ttft_s=row["server_ttft_s"],
        server_latency_s=row["server_latency_s"],
        mode=row["answered_mode"],
        instance=row.get("answered_by", ""),
    )
