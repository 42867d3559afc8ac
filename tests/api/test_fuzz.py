"""Malformed requests, a part of what `fuzz.py` does as a script."""

from collections.abc import Callable

from .footprint import is_back
from .fuzz import FLAGS, run
from .server_process import ServerProcess


def test_no_malformed_request_is_answered_with_5xx_or_not_at_all_or_leaves_anything(
    start_process: Callable[..., ServerProcess],
) -> None:
    server = start_process("dynamic", *FLAGS).wait_until_ready()
    seen = run(server, 1500, seed=1_000_000)
    assert seen["bad"] == []
    assert {"200", "400", "404", "405"} <= set(seen["answers"])
    assert is_back(seen["before"], seen["after"])
