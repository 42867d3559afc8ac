"""Gunicorn's worker as this server needs it: its main thread reads the requests, all connections at once, and a thread gets a
request only when all of it is there. So clients that are slow or silent cost a descriptor and no thread, and are let go when
their time is over. Must not know the engine: what is done about requests when a signal comes, `gunicorn.conf.py` says.

A connection is read (`_waiting`: it has sent a part of a request or nothing yet), served by a thread, or ended: the answer is
written, and what the client still sends is taken and thrown away for a moment, so that it sees the answer and not a reset
(RFC 9112, section 9.6).
"""

import contextlib
import errno
import logging
import selectors
import signal
import socket
import sys
import time
from functools import partial
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from api import files
from api.client_socket import ClientSocket
from api.errors import raw_answer
from api.incoming import IN_MEMORY_BYTES, MIN_BYTES_PER_S, Incoming, Refusal
from api.threads import Threads

# A terminal sends these to everybody who runs in it. What is to be done about them the master decides, and tells the worker.
MASTERS_SIGNALS = (signal.SIGINT, signal.SIGHUP)
LOOK_S = 0.5  # between looks at the deadlines
SEND_S = 60.0  # for a client to take a piece of its answer
HEALTH_SEND_S = 2.0
LINGER_S = 2.0
LAST_REQUESTS_S = 2.0  # a server that ends still answers whom it told that the connection can be used again
QUIT_S = 5.0  # for the last answers, where nobody wants to wait
ACCEPTED_AT_ONCE = 64
READ_BYTES, READ_LARGE_BYTES = 64 << 10, 1 << 20
MAX_STORED_BYTES = 2 << 30  # of bodies that are under way
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger("batchlab")


class Connection:
    """`incoming` is its present request, `deadline` when it is let go."""

    def __init__(self, sock: ClientSocket, client: Any) -> None:
        self.sock, self.client, self.server = sock, client, sock.getsockname()
        self.incoming: Incoming
        self.number = 0  # of the request
        self.deadline = 0.0
        self.lingers = False

    @property
    def is_idle(self) -> bool:
        return self.number > 1 and not self.incoming.num_received

    def worth(self, now: float) -> float:
        """The least is let go first where there are too many: the slowest, but an idle one before one that keeps its rate."""
        if self.lingers:
            return -1.0
        return MIN_BYTES_PER_S if self.is_idle else self.incoming.num_received / (now - self.incoming.since + 1.0)


class Worker(ThreadWorker):
    SIGNALS = tuple(number for number in ThreadWorker.SIGNALS if number not in MASTERS_SIGNALS)  # set to their defaults
    # For gunicorn's `handle_request`, which keeps connections open as long as there is room.
    keepalived_conns = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_keepalived = 1
        self._waiting: dict[Connection, None] = {}  # the oldest first
        self._num_served = 0  # connections that a thread has, or will have
        self._num_stored = 0  # bytes
        self._patience_s = float(self.cfg.graceful_timeout)
        self._threads = Threads("http", self.cfg.threads)
        self._health_threads = Threads("health", 2)  # /health is answered whatever the others do

    # Signals.

    def init_signals(self) -> None:
        for number in MASTERS_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGQUIT: as SIGTERM, and soon."""
        self._patience_s = QUIT_S
        self.handle_exit(sig, frame)

    # The main thread.

    def get_thread_pool(self) -> None:
        """Not gunicorn's."""

    def run(self) -> None:
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        while self.alive and self.is_parent_alive():
            self.set_accept_enabled(bool(self._waiting) or self._num_served < self.worker_connections)
            self._turn()
        self.set_accept_enabled(False)
        for listener in self.sockets:
            listener.close()
        ended = time.monotonic()
        while (self._num_served or self._waiting) and time.monotonic() < ended + self._patience_s:
            for connection in self._waiting:
                connection.deadline = min(connection.deadline, ended + LAST_REQUESTS_S)
            self._turn()

    def _turn(self) -> None:
        self.notify()
        self.wait_for_and_dispatch_events(LOOK_S)
        now = time.monotonic()
        for connection in [one for one in self._waiting if one.deadline <= now]:
            self._give_up(connection)

    def accept(self, listener: Any) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if len(self._waiting) + self._num_served >= self.worker_connections and not self._drop_one():
                return
            try:
                accepted, address = listener.accept()
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS and not self._drop_one():
                    self.set_accept_enabled(False)  # until the next turn
                return
            sock = ClientSocket(fileno=accepted.detach())
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._read_next(Connection(sock, address))

    def _drop_one(self) -> bool:
        now = time.monotonic()
        if not self._waiting:
            return False
        self._close(min(self._waiting, key=lambda connection: connection.worth(now)))
        return True

    def _read_next(self, connection: Connection, begun: bytes = b"") -> None:
        """Read its next request, of which something may have come already."""
        now = time.monotonic()
        connection.number += 1
        connection.incoming = Incoming(self.cfg, connection.client, connection.number, self._limit_of, now)
        connection.deadline = now + self.cfg.keepalive if connection.is_idle else connection.incoming.deadline
        connection.sock.setblocking(False)
        self._waiting[connection] = None
        self.poller.register(connection.sock, selectors.EVENT_READ, partial(self._on_readable, connection))
        if begun:
            self._feed(connection, begun)

    def _limit_of(self, request: Any) -> int:
        """The most bytes that the body of this request may have."""
        if (request.method, request.path) == ("POST", "/v1/files"):
            return files.MAX_FILE_BYTES + files.FORM_BYTES
        return int(self.wsgi.config["MAX_CONTENT_LENGTH"])

    def _on_readable(self, connection: Connection, sock: ClientSocket) -> None:
        if connection not in self._waiting:
            return  # it was let go in this very turn
        large = connection.incoming.num_stored > READ_BYTES  # each read gives the GIL away
        try:
            data = sock.recv(READ_LARGE_BYTES if large else READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = None
        if data and connection.lingers:
            return
        if data:
            self._feed(connection, data)
        elif data == b"" and connection.incoming.num_received and not connection.lingers:
            self._refuse(connection, Refusal(400, f"the client sends no more: {connection.incoming.missing}", "incomplete"))
        else:
            self._close(connection)

    def _feed(self, connection: Connection, data: bytes) -> None:
        incoming = connection.incoming
        before = incoming.num_stored
        try:
            try:
                incoming.feed(data, time.monotonic())
            finally:
                self._num_stored += incoming.num_stored - before
            if self._num_stored > MAX_STORED_BYTES and incoming.num_stored > IN_MEMORY_BYTES:
                raise Refusal(503, "more is being uploaded than this server takes at once", "overloaded")
            if incoming.expects_continue:
                incoming.request._expected_100_continue = False
                connection.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        except Refusal as refusal:
            self._refuse(connection, refusal)
        except OSError:
            self._close(connection)
        else:
            connection.deadline = incoming.deadline
            if incoming.done:
                self._serve(connection)

    def _serve(self, connection: Connection) -> None:
        self.poller.unregister(connection.sock)
        del self._waiting[connection]
        self._num_served += 1
        is_health = connection.incoming.request.path == "/health"
        connection.sock.settimeout(HEALTH_SEND_S if is_health else SEND_S)
        connection.sock.begin_answer()
        (self._health_threads if is_health else self._threads).submit(partial(self._answer, connection))

    def _on_served(self, connection: Connection, keep: bool) -> None:
        self._num_served -= 1
        self._forget(connection.incoming)
        if keep:
            self._read_next(connection, connection.incoming.rest)
        else:
            self._end(connection)

    def _give_up(self, connection: Connection) -> None:
        """Its time is over."""
        if connection.lingers or not connection.incoming.num_received:
            self._close(connection)
        else:
            self._refuse(connection, Refusal(408, f"the client is too slow: {connection.incoming.missing}", "too_slow"))

    def _refuse(self, connection: Connection, refusal: Refusal) -> None:
        try:
            connection.sock.send(raw_answer(refusal.status, str(refusal), refusal.code))
        except OSError:
            self._close(connection)
        else:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        """The last answer is written."""
        try:
            connection.sock.setblocking(False)
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
            return
        self._forget(connection.incoming)
        connection.lingers, connection.deadline = True, time.monotonic() + LINGER_S
        if connection not in self._waiting:
            self._waiting[connection] = None
            self.poller.register(connection.sock, selectors.EVENT_READ, partial(self._on_readable, connection))

    def _close(self, connection: Connection) -> None:
        if connection in self._waiting:
            del self._waiting[connection]
            self.poller.unregister(connection.sock)
        self._forget(connection.incoming)
        connection.sock.close()

    def _forget(self, incoming: Incoming) -> None:
        self._num_stored -= incoming.num_stored
        incoming.close()

    # The threads that have a request.

    def _answer(self, connection: Connection) -> None:
        keep, incoming = False, connection.incoming
        try:
            if incoming.must_close:
                incoming.request.force_close()
            keep = bool(self.handle_request(incoming.request, connection)) and not incoming.must_close
        except (OSError, StopIteration):  # the client has gone; or the answer broke off, and gunicorn has said so
            pass
        except Exception as error:
            self.handle_error(incoming.request, connection.sock, connection.client, error)
        finally:
            self.method_queue.defer(self._on_served, connection, keep)

    def handle_error(self, request: Any, client: Any, address: Any, error: Exception) -> None:
        """What the application could not answer itself."""
        log.error("%s %s", request.method, request.path, exc_info=sys.exc_info())
        with contextlib.suppress(OSError):
            client.sendall(raw_answer(500, f"{type(error).__name__} inside the server; its log says more", "internal_error"))
