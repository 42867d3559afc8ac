"""Waiting for answers on an HTTP thread: asleep on an Event, looking about once a second whether somebody still waits."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from api.client_socket import ClientSocket
from batching.loop import BatchingLoop, Ticket
from batching.request import Request

HANG_UP_CHECK_S = 1.0


def run_all(loop: BatchingLoop, requests: Sequence[Request], connection: ClientSocket | None) -> None:
    """Hand `requests` over and wait until all are answered. Raises the first error among them. `connection`: the client's
    socket, or None; when it hangs up, all of them are cancelled."""
    events = [threading.Event() for _ in requests]
    with _submitted(loop, requests, events) as tickets:
        for ticket, event in zip(tickets, events, strict=True):
            while not event.wait(HANG_UP_CHECK_S):
                if hung_up(connection):
                    _cancel(loop, tickets)
            if ticket.request.error is not None:
                raise ticket.request.error


def as_they_grow(loop: BatchingLoop, requests: Sequence[Request], connection: ClientSocket | None) -> Iterator[None]:
    """As `run_all`, but comes back whenever there is news: tokens, or answers. Closing it cancels what still runs."""
    news, events = threading.Event(), [threading.Event() for _ in requests]
    with _submitted(loop, requests, [_Both(event, news) for event in events], news):
        done = False
        while not done:
            while not news.wait(HANG_UP_CHECK_S):
                if hung_up(connection):
                    return
            news.clear()
            done = all(event.is_set() for event in events)
            for req, event in zip(requests, events, strict=True):
                if event.is_set() and req.error is not None:
                    raise req.error
            yield


class _Both:
    def __init__(self, event: threading.Event, news: threading.Event) -> None:
        self._events = event, news

    def set(self) -> None:
        for event in self._events:
            event.set()


@contextmanager
def _submitted(
    loop: BatchingLoop, requests: Sequence[Request], answered: Sequence[Any], token: threading.Event | None = None
) -> Iterator[list[Ticket]]:
    """Those that are not answered by the end are cancelled, also where handing over the next one fails."""
    tickets: list[Ticket] = []
    try:
        for req, signal in zip(requests, answered, strict=True):
            tickets.append(loop.submit(req, signal, token))
        yield tickets
    finally:
        _cancel(loop, tickets)


def _cancel(loop: BatchingLoop, tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        if ticket.request.answered_at is None:
            loop.cancel(ticket)


def hung_up(connection: ClientSocket | None) -> bool:
    """Whether the client has closed its connection."""
    return connection is not None and connection.hung_up()
