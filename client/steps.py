"""The server's step records, read from GET /steps while a run goes on, and put on the run's clock.

The server keeps the last ten thousand or so, which a long run outgrows: so they are fetched as it goes. A server without that
route is measured without them. It must not know of pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any

from client.answers import ModeRun
from client.connection import ClientError, Server
from client.shared import schema

POLL_S = 0.5
PAGE = 1000  # records a call


class StepLog:
    """Reads on where it stopped. ``there`` turns False at a server without step records that this client can read, and where
    several servers answer: the ids of their steps go on from each other's as if they were one's. ``note`` says why, if it is
    worth a line."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._after = 0
        self._slots = 0
        self.there = True
        self.note = ""

    async def skip(self) -> None:
        """Past what was before."""
        while len(await self._page()) == PAGE:  # a shorter one was the last, however busy the engine is
            pass

    async def follow(self, run: ModeRun, start: float, over: asyncio.Event) -> None:
        """Fetch records until ``over``; leave them in ``run``, their ``end_s`` on the clock whose 0 is ``start``."""
        records: list[dict[str, Any]] = []
        ahead_s = math.inf  # of the run's clock: no record can have been read before its step had ended
        last = False
        try:
            while self.there and not last:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(over.wait(), POLL_S)
                last = over.is_set()
                more = True
                while more and (page := await self._page()):
                    records += page
                    ahead_s = min(ahead_s, time.perf_counter() - start - page[-1]["end"])
                    more = len(page) == PAGE
        except ClientError:
            pass  # the server is gone or busy: the requests say so
        finally:
            if self.there:
                run.slots = self._slots
                run.steps = [record | {"end_s": record["end"] + ahead_s} for record in records]

    async def _page(self) -> list[dict[str, Any]]:
        try:
            found = await self._server.call("GET", f"/steps?after={self._after}&limit={PAGE}")
        except ClientError as error:
            if error.status is None or error.status >= 500:
                raise
            self.there = False
            return []
        steps, slots = found.get("steps"), found.get("slots")
        if not isinstance(steps, list) or not isinstance(slots, int) or self._mixed(steps):
            self.there = False
            return []
        try:
            schema.check(found.get("schema"), schema.STEPS, "step records")
        except schema.SchemaError as error:
            self.there, self.note = False, f"measured without the server's step records: {error}"
            return []
        self._slots = slots
        if steps:
            self._after = steps[-1]["id"]
        return steps

    def _mixed(self, steps: list[dict[str, Any]]) -> bool:
        """Whether these are another server's, or may be."""
        return len(self._server.instances) > 1 or bool(steps and steps[0]["id"] <= self._after)
