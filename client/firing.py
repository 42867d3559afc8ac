"""Sends a plan: in an open loop each request at its planned time, whatever became of those before; in a closed loop each as
soon as one of its users is free.

It must not know what a request looks like on the wire, nor what is made of the answers: it is given a function that sends one.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tqdm import tqdm

from client.answers import Answer, ModeRun
from client.connection import ClientError, Server
from client.shared.plan import Plan, PlannedRequest

GRACE_S = 5.0  # after the server is gone: how long to wait for the answers still on their way

Send = Callable[[PlannedRequest, float], Awaitable[Answer]]


async def fire(server: Server, plan: Plan, run: ModeRun, send: Send, start: float) -> None:
    """Send all of it, time 0 being ``start``; answers go into ``run`` as they come, so that none is lost.

    Raises ClientError where the server is gone; the answers of requests that failed alone are in ``run`` as well.
    """
    with tqdm(total=len(plan.requests), desc=run.mode, unit="request", file=sys.stderr) as bar:
        await _Firing(server, run, send, start, bar).all_of(plan)


class _Firing:
    def __init__(self, server: Server, run: ModeRun, send: Send, start: float, bar: tqdm) -> None:
        self._server = server
        self._run = run
        self._send = send
        self._start = start
        self._bar = bar
        self._in_flight: set[asyncio.Task[None]] = set()
        self._gone = asyncio.Event()
        self._probe = asyncio.Lock()

    async def all_of(self, plan: Plan) -> None:
        pace = asyncio.create_task(self._users(plan, plan.users) if plan.users else self._on_time(plan))
        end = asyncio.create_task(self._all_answered(pace))
        gone = asyncio.create_task(self._gone.wait())
        try:
            await asyncio.wait({end, gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.is_set():
                pace.cancel()
                await self._last_answers()
                good = sum(not answer.error for answer in self._run.answers)
                told = f"after {good} of {len(plan.requests)} answers; what came is kept"
                raise ClientError(f"the server at {self._server.url} went away in mode {self._run.mode}, {told}")
            await end  # for what it may have raised
        finally:
            tasks = [pace, end, gone, *self._in_flight]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _on_time(self, plan: Plan) -> None:
        for request in plan.requests:
            await asyncio.sleep(max(0.0, request.at_s - self._now()))
            self._begin(request)

    async def _users(self, plan: Plan, users: int) -> None:
        turn = iter(plan.requests)

        async def user() -> None:
            for request in turn:
                await asyncio.wait({self._begin(replace(request, at_s=self._now()))})

        await asyncio.sleep(max(0.0, -self._now()))
        await asyncio.gather(*(user() for _ in range(users)))

    def _begin(self, request: PlannedRequest) -> asyncio.Task[None]:
        task = asyncio.create_task(self._one(request))
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)
        return task

    async def _one(self, request: PlannedRequest) -> None:
        sent_s = self._now()
        try:
            answer = await self._send(request, self._start)
        except Exception as error:  # whatever it is: an answer is owed for each request
            answer = Answer(request, sent_s, self._now(), error="client error", message=repr(error))
        self._run.answers.append(answer)
        self._bar.update()
        if answer.error in ("connection lost", "no connection"):
            async with self._probe:
                if not self._gone.is_set() and not await self._server.is_there():
                    self._gone.set()

    async def _all_answered(self, pace: asyncio.Task[None]) -> None:
        await asyncio.wait({pace})
        while self._in_flight:
            await asyncio.wait(set(self._in_flight))
        if not pace.cancelled():
            pace.result()

    async def _last_answers(self) -> None:
        """As long as they keep coming."""
        while self._in_flight:
            done, _ = await asyncio.wait(set(self._in_flight), timeout=GRACE_S, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                return

    def _now(self) -> float:
        return time.perf_counter() - self._start
