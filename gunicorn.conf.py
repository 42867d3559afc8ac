"""Gunicorn as this server needs it: one worker, which holds the model, and a thread for every request that may wait."""

import os
import signal
import threading

from config import read as read_settings  # not `import config`: gunicorn would take that for its own setting

settings = read_settings({}, os.environ, {})

wsgi_app = "app:application()"
bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = 1
worker_class = "gthread"
threads = settings.threads
worker_connections = settings.threads + 1000  # beyond the threads a connection waits to be read
backlog = 2048
timeout = 120  # the worker's main loop only accepts; a worker this silent is stuck
graceful_timeout = 30
loglevel = "warning"
proc_name = "batchlab"

DRAIN_MARGIN_S = 2  # what is left for the last answers to be written


GAVE_UP = 3  # a worker's status once it has said in a line of its own why the server cannot go on


def on_starting(server):
    """That line is enough: gunicorn would add three."""

    def is_news(record):
        if record.msg == "Worker (pid:%s) exited with code %s.":
            return record.args[1] != GAVE_UP
        return record.msg not in ("Shutting down: %s", "Reason: %s")

    server.log.error_log.addFilter(is_news)


def when_ready(server):
    """Gunicorn's reload (SIGHUP) would start a second worker beside the first, which has the model and the data folder."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def worker_exit(server, worker):
    """What has come back of batches is kept; lines under way are run again after the next start."""
    if hasattr(worker, "wsgi"):
        worker.wsgi.extensions["runner"].stop(DRAIN_MARGIN_S)


def post_worker_init(worker):
    """On SIGTERM gunicorn closes the listener and waits for the requests; tell the batching loop to answer the queued ones."""
    loop = worker.wsgi.extensions["batching"]
    close_listener = signal.getsignal(signal.SIGTERM)

    def drain() -> None:
        loop.drain("the server is shutting down")
        if not loop.join(graceful_timeout - DRAIN_MARGIN_S):
            loop.abort("the server is shutting down, and the time to finish is over")
            loop.join(DRAIN_MARGIN_S)

    def on_sigterm(number, frame):
        print("shutting down: what runs may finish, what is queued gets 503", flush=True)
        threading.Thread(target=drain, name="drain", daemon=True).start()
        close_listener(number, frame)

    def on_sigquit(number, frame):
        """Ctrl-C: nobody wants to wait, but everybody gets an answer: their threads end before the process does. Gunicorn's
        own handler waits for a lock of the thread pool, for ever if the signal came while this very thread held it."""
        loop.drain("the server was stopped")
        loop.abort("the server was stopped")
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, on_sigterm)
    signal.signal(signal.SIGQUIT, on_sigquit)
