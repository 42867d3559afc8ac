"""The connection to a client that waits for an answer, which can tell whether the client is still there.

A client that has closed its connection and one that has only said that it sends no more (RFC 9293, section 3.6: a half-closed
connection, which gets its answer) look alike until something is written: the first one's machine then answers with a reset.
What can be written at any time is the answer's own first bytes, which are the same for all answers.
"""

import select
import socket
import time
from typing import Any

FIRST_BYTES = b"HTTP/1."
RESET = select.POLLERR | select.POLLHUP | select.POLLNVAL
RESET_WITHIN_MS = 50
NO_MORE = getattr(select, "POLLRDHUP", 0)  # Linux has it


class ClientSocket(socket.socket):
    def begin_answer(self) -> None:
        """From here on `hung_up` may write an answer's first bytes, until the answer itself is written."""
        self._num_ahead = 0
        self._answering = False
        self._probe_at, self._pause_s = 0.0, 1.0

    def hung_up(self) -> bool:
        """Whether the client is known to have gone. To be asked again and again: now and then another byte is tried."""
        events = self._events(NO_MORE)
        if events & RESET or not events or self._answering or self._num_ahead == len(FIRST_BYTES):
            return bool(events & RESET)
        has_room = self._events(select.POLLOUT) & select.POLLOUT  # else `send` would wait, and a live client be taken for gone
        if has_room and (now := time.monotonic()) >= self._probe_at:
            try:
                self.send(FIRST_BYTES[self._num_ahead : self._num_ahead + 1], socket.MSG_DONTWAIT)
            except OSError:
                return True
            self._num_ahead += 1
            self._probe_at, self._pause_s = now + self._pause_s, 2 * self._pause_s
        return bool(self._events(0, RESET_WITHIN_MS))

    @property
    def sends_no_more(self) -> bool:
        """Whether the client has closed its connection, or half of it."""
        return bool(self._events(NO_MORE))

    def _events(self, asked_for: int, timeout_ms: int = 0) -> int:
        """Those, and resets."""
        poller = select.poll()
        poller.register(self.fileno(), asked_for)
        return sum(found for _, found in poller.poll(timeout_ms))

    def sendall(self, data: Any, flags: int = 0) -> None:
        if self._num_ahead:
            assert bytes(data[: self._num_ahead]) == FIRST_BYTES[: self._num_ahead]
            data, self._num_ahead = data[self._num_ahead :], 0
        self._answering = True
        super().sendall(data, flags)
