"""The client: fires seeded requests at a BatchLab server, mode after mode, and compares what came back.

Open loop: the plan is made before the run and each request leaves at its planned time from a thread of its own, so
that a slow server cannot slow the client's clock. It talks HTTP only and must not import anything of the server.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from arguments import parse_arguments
from connection import ClientError, Server
from report import Answer, ModeRun, table, write_csv, write_plot
from tqdm import tqdm
from workload import PlannedRequest, make_plan

OPEN_SOCKETS = 8192
POLL_S = 0.2
GRACE_S = 5.0  # after the server is gone: how long to wait for the answers still on their way


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when it did what was asked, 1 when it could not, 2 (SystemExit) for bad arguments."""
    args = parse_arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the console's encoding lacks
    server = Server(args.url, args.api_key)
    try:
        if args.prompt is not None:
            return ask_once(server, args)
        return compare(server, args)
    except ClientError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C")


def compare(server: Server, args: argparse.Namespace) -> int:
    """Fire one plan in each mode, then print the table and write CSV and plot, also of a run cut short."""
    plan = make_plan(args.numsamples, args.wait, args.numtokens_range, args.selection, args.deferred, args.seed)
    now = server.call("GET", "/mode")
    if "mode" not in now:
        raise ClientError(f"{server.url} answers, but not as a BatchLab server does")
    known = now.get("modes") or {}
    for mode in args.modes or ():
        if mode not in known:
            server.switch(mode)  # for the server's own words, now and not when the modes before it have run
    _make_folder(args.out)
    _allow_open_sockets()

    runs: list[ModeRun] = []
    stopped = ""
    try:
        for mode in args.modes or [str(now["mode"])]:
            if args.modes:
                server.switch(mode)
            server.reset_stats()
            runs.append(ModeRun(mode))
            fire(server, plan, runs[-1])
            runs[-1].stats = server.call("GET", "/stats")
    except ClientError as error:
        stopped = str(error)
    except KeyboardInterrupt:
        stopped = "stopped by Ctrl-C; what came is kept"

    runs = [run for run in runs if run.answers]
    if runs:
        _write_report(server, args, runs)
    if not stopped and not any(not answer.error for run in runs for answer in run.answers):
        stopped = "not one request was answered"
    return _fail(stopped) if stopped else 0


def _write_report(server: Server, args: argparse.Namespace, runs: Sequence[ModeRun]) -> None:
    stats = runs[0].stats
    parts = [f"{key} {stats[key]}" for key in ("model", "weights", "vocabulary", "device", "dtype") if key in stats]
    lengths = ", ".join(str(length) for length in sorted(set(args.numtokens_range)))
    print(f"{server.url}" + (f": {', '.join(parts)}" if parts else ""))
    print(f"{args.numsamples} requests of {lengths} tokens, {args.selection}, seed {args.seed}, the same in every mode")
    print(f"\n{table(runs)}\n")
    csv_path, plot_path = args.out / "results.csv", args.out / "latency.png"
    try:
        write_csv(csv_path, runs)
        write_plot(plot_path, runs)
    except OSError as error:
        raise ClientError(f"cannot write the results in {args.out}: {error.strerror or error}") from None
    print(f"every request: {csv_path}\nplot: {plot_path}")


def ask_once(server: Server, args: argparse.Namespace) -> int:
    """One request of the user's own; its completion and its times on stdout."""
    request = PlannedRequest(0, 0.0, args.prompt, args.numtokens, "immediate", args.seed)
    start = time.perf_counter()
    answer = server.infer(request, start)
    if answer.error:
        # The same words for a missing server or key as everywhere; call() raises where the whole server is at fault.
        server.call("GET", "/mode")
        return _fail(f"{answer.error}: {answer.message}" if answer.message else answer.error)
    print(answer.completion)
    times = [
        f"{answer.tokens} tokens in mode {answer.mode or '-'}",
        f"latency {answer.latency_s:.3f} s seen from here",
        f"{_seconds(answer.server_latency_s)} in the server",
        f"first token after {_seconds(answer.server_ttft_s)}",
    ]
    print("\n" + ", ".join(times))
    return 0


def fire(server: Server, plan: Sequence[PlannedRequest], run: ModeRun) -> None:
    """Send each request at its planned time; answers go into ``run`` as they come, so that none is lost.

    Raises ClientError where the server is gone; the answers of requests that failed alone are in ``run`` as well.
    """
    inbox: queue.Queue[Answer] = queue.Queue()
    gone = threading.Event()
    unsent = deque(plan)
    start = time.perf_counter()

    def send(request: PlannedRequest) -> None:
        sent_s = time.perf_counter() - start
        try:
            answer = server.infer(request, start)
        except Exception as error:  # whatever it is: without an answer in the inbox the run would wait for ever
            answer = Answer(request, sent_s, time.perf_counter() - start, error="client error", message=repr(error))
        if answer.error == "connection lost" and not gone.is_set() and not server.is_there():
            gone.set()
        inbox.put(answer)

    with tqdm(total=len(plan), desc=run.mode, unit="request", file=sys.stderr) as bar:
        quiet_since: float | None = None  # the last sign of life after the server was found gone
        while len(run.answers) < len(plan):
            now = time.perf_counter() - start
            if gone.is_set():
                quiet_since = now if quiet_since is None else quiet_since
                in_flight = len(plan) - len(unsent) - len(run.answers)
                if not in_flight or now - quiet_since > GRACE_S:
                    break
            elif unsent and unsent[0].at_s <= now:
                request = unsent.popleft()
                try:
                    threading.Thread(target=send, args=(request,), daemon=True).start()
                except RuntimeError:  # this machine's own limit
                    inbox.put(Answer(request, now, now, error="no thread left", message="too many open requests here"))
                continue
            pause = POLL_S if gone.is_set() or not unsent else min(POLL_S, unsent[0].at_s - now)
            try:
                run.answers.append(inbox.get(timeout=pause))
            except queue.Empty:
                continue
            if quiet_since is not None:
                quiet_since = time.perf_counter() - start
            bar.update()
    if gone.is_set():
        good = sum(not answer.error for answer in run.answers)
        raise ClientError(
            f"the server at {server.url} went away in mode {run.mode}, after {good} of {len(plan)} answers; what came is kept"
        )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def _allow_open_sockets() -> None:
    """One socket per waiting request: macOS lets a program open 256 files unless it asks for more."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_SOCKETS:
        wanted = OPEN_SOCKETS if hard == resource.RLIM_INFINITY else min(hard, OPEN_SOCKETS)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _make_folder(path: Path) -> None:
    """Before the run: an hour's results must not end at a folder that cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClientError(f"--out {path}: cannot make this folder: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise ClientError(f"--out {path}: this folder cannot be written")


def _fail(text: str) -> int:
    print(f"client: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
