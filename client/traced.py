"""A run as the trace in `shared/perfetto.py` has it."""

from __future__ import annotations

from typing import Any

from client.answers import Answer, ModeRun
from client.shared.perfetto import Served, Traced


def traced(stream: str, run: ModeRun) -> Traced:
    """``stream``: the name of its plan, empty where there is one only."""
    named = (stream, run.mode, f"repeat {run.repeat}" if run.repeat > 1 else "")
    served = (_served(answer) for answer in sorted(run.answers, key=lambda answer: answer.request.index))
    return Traced(", ".join(filter(None, named)), run.steps or [], served)


def _served(answer: Answer) -> Served:
    request = answer.request
    first_s = answer.piece_times[0] if answer.piece_times else None
    if first_s is None and answer.server_ttft_s is not None and not answer.error:
        first_s = answer.sent_s + answer.server_ttft_s  # as the server told: it counts from the arrival
    more: dict[str, Any] = {
        "prompt_tokens": answer.prompt_tokens or request.prompt_tokens,
        "output_tokens": answer.tokens,
        "sent_s": answer.sent_s,
    }
    more |= {"error": answer.error} if answer.error else {}
    return Served(request.index, request.priority, request.at_s, answer.done_s, first_s, more)
