"""Gunicorn as this server needs it: one worker, which holds the model, and a thread for every request that may wait."""

import contextlib
import faulthandler
import os
import resource
import signal
import threading

from config import OTHER_FILES
from config import read as read_settings  # not `import config`: gunicorn would take that for its own setting

settings = read_settings({}, os.environ, {})

wsgi_app = "app:application()"
bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = 1
worker_class = "api.worker.Worker"
threads = settings.threads
worker_connections = max(1, min(settings.connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHER_FILES))
keepalive = 310  # seconds; clients let unused connections go earlier (OkHttp and Chrome after 300, Go after 90)
backlog = 2048
sendfile = False  # piece by piece instead, each within its time
timeout = 120  # the worker's main loop only accepts; a worker this silent is stuck, as in a call that keeps the GIL
graceful_timeout = 30
loglevel = "warning"
proc_name = "batchlab"
forwarder_headers = ""  # else a client on this machine could move every route by a header
control_socket_disable = True  # through it a second worker could be added, beside the one that has the model

DRAIN_MARGIN_S = 2  # what is left for the last answers to be written
GAVE_UP = 3  # a worker's status once it has said in a line of its own why the server cannot go on
outlives_terminal = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # started with nohup


def on_starting(server):
    """That line is enough: gunicorn would add three."""

    def is_news(record):
        if record.msg == "Worker (pid:%s) exited with code %s.":
            return record.args[1] != GAVE_UP
        return record.msg not in ("Shutting down: %s", "Reason: %s")

    server.log.error_log.addFilter(is_news)


def when_ready(server):
    """What the master does about signals. Gunicorn would start a second worker (SIGHUP, SIGTTIN) or another master (SIGUSR2)
    beside the one that has the model and the data folder; a terminal that is closed ends the server as SIGTERM does."""
    for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if outlives_terminal else lambda *_: server.signal(signal.SIGTERM, None))


def worker_exit(server, worker):
    """What has come back of batches is kept; lines under way are run again after the next start."""
    if hasattr(worker, "wsgi"):
        worker.wsgi.extensions["runner"].stop(DRAIN_MARGIN_S)
        worker.wsgi.extensions["store"].close()  # which brings SQLite's log into the database


def post_worker_init(worker):
    """On a signal the worker closes the listener and waits for the answers; tell the batching loop to give them."""
    faulthandler.enable()  # a stuck worker is ended by SIGABRT, and says first what each thread was doing
    loop = worker.wsgi.extensions["batching"]

    def drain() -> None:
        loop.drain("the server is shutting down")
        if not loop.join(graceful_timeout - DRAIN_MARGIN_S):
            loop.abort("the server is shutting down, and the time to finish is over")
            loop.join(DRAIN_MARGIN_S)

    def stop() -> None:
        loop.drain("the server was stopped")
        loop.abort("the server was stopped")

    def on_sigterm(number, frame):
        with contextlib.suppress(OSError):  # the terminal is gone
            print("shutting down: what runs may finish, what is queued gets 503", flush=True)
        threading.Thread(target=drain, name="drain", daemon=True).start()
        worker.handle_exit(number, frame)

    def on_sigquit(number, frame):
        """Ctrl-C, as the master hands it on: nobody wants to wait, but everybody gets an answer."""
        threading.Thread(target=stop, name="stop", daemon=True).start()
        worker.handle_quit(number, frame)

    signal.signal(signal.SIGTERM, on_sigterm)
    signal.signal(signal.SIGQUIT, on_sigquit)
