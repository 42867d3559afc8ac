"""The client: fires planned requests at a BatchLab server, mode after mode, and compares what came back.

Open loop: the plan is made before the run and each request leaves at its planned time, so that a slow server cannot slow the
client's clock. It talks HTTP only and must not import anything of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from client.answers import Answer, ModeRun, Stream, each_of, one_of_each_mode
from client.arguments import parse_arguments, read_workloads
from client.connection import ClientError, Server
from client.firing import Send, fire
from client.report import write_report, write_results
from client.saved import read_results
from client.shared.perfetto import write_trace
from client.shared.plan import Plan, PlannedRequest, read_plan, write_plan
from client.steps import StepLog
from client.tables import table, warnings
from client.traced import traced
from client.workload import make_plan

OPEN_SOCKETS = 8192
LEAD_S = 0.05  # from the last preparation to the plan's time 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when it did what was asked, 1 when it could not, 2 (SystemExit) for bad arguments."""
    args = parse_arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the console's encoding lacks
    try:
        if args.prompt is not None:
            return asyncio.run(ask_once(args))
        if args.results:
            return report_again(args)
        if args.plan:
            streams = [Stream("", read_plan(args.plan))]
        else:
            streams = [Stream(name, make_plan(workload)) for name, workload in read_workloads(args).items()]
        for note in dict.fromkeys(note for stream in streams for note in stream.plan.notes):
            print(f"note: {note}", file=sys.stderr)
        return show_plans(streams, args) if args.plan_only else compare(streams, args)
    except ClientError as error:
        return _fail(str(error))
    except ValueError as error:  # a trace, a plan or a distribution that will not do
        print(f"client.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 0
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C")


def show_plans(streams: Sequence[Stream], args: argparse.Namespace) -> int:
    """Write each plan and its picture, and send nothing."""
    from client.plots import draw_plan

    for stream in streams:
        plan, folder = stream.plan, (args.report or args.out) / stream.folder
        _make_folder(folder)
        with _written_in(folder):
            write_plan(folder / "plan.json", plan)
            draw_plan(folder / "plan.png", plan)
        print(f"{len(plan.requests)} requests within {plan.duration_s:.1f} s; {plan.made}")
        print(f"plan: {folder / 'plan.json'}\npicture: {folder / 'plan.png'}")
    return 0


def report_again(args: argparse.Namespace) -> int:
    """The tables and the page of runs that were written before, here or by the simulator."""
    about, stream = read_results(args.results)
    if args.report:
        _make_folder(args.report)
    print(f"{about}\n{stream.plan.made}\n\n{table(stream.runs, args.goodput)}\n")
    for line in warnings(stream.runs):
        print(f"warning: {line}")
    if args.perfetto:
        print(_write_trace(args.perfetto, [stream], about))
    if not args.report:
        return 0
    with _written_in(args.report):
        if all(request.prompt for request in stream.plan.requests):  # those of the simulator have no text
            write_plan(args.report / "plan.json", stream.plan)
        print(write_results(args.report, stream.runs))
        print(write_report(args.report, [stream], args.goodput, about))
    return 0


def compare(streams: Sequence[Stream], args: argparse.Namespace) -> int:
    """Fire each plan in each mode, then print the tables and write the results, also of a run cut short."""
    stopped = ""
    try:
        asyncio.run(run_modes(streams, args))
    except ClientError as error:
        stopped = str(error)
    except KeyboardInterrupt:
        stopped = "stopped by Ctrl-C; what came is kept"
    for stream in streams:
        stream.runs = one_of_each_mode(run for run in stream.runs if run.answers)
    streams = [stream for stream in streams if stream.runs]
    if streams:
        _show_and_write(streams, args, stopped)
    if not stopped and not any(not answer.error for stream in streams for run in stream.runs for answer in run.answers):
        stopped = "not one request was answered"
    return _fail(stopped) if stopped else 0


async def run_modes(streams: Sequence[Stream], args: argparse.Namespace) -> None:
    """Switch, reset, fire, read: into each stream's ``runs``, mode after mode. Raises ClientError."""
    async with Server(args.url, args.api_key) as server:
        now = await server.call("GET", "/mode")
        if "mode" not in now:
            raise ClientError(f"{server.url} answers, but not as a BatchLab server does")
        known = now.get("modes") or {}
        for mode in args.modes or ():
            if mode not in known:
                await server.switch(mode)  # for the server's own words, now and not when the modes before it have run
        send = await _sender(server, args.stream)
        _make_folder(args.report or args.out)
        _allow_open_sockets()
        log = StepLog(server) if args.report or args.perfetto else None

        for stream in streams:
            modes = args.modes or [str(now["mode"])]
            # Every other time backwards, so that what changes as time passes does not always meet the same mode first.
            turns = [(n, mode) for n in range(1, args.repeat + 1) for mode in (modes if n % 2 else modes[::-1])]
            for number, mode in turns:
                server.instances.clear()
                run = ModeRun(mode, repeat=number)
                asked = (await server.switch(mode)).get("modes") if args.modes else {mode: now.get("params")}
                run.params = (asked or {}).get(mode)
                await server.reset_stats()
                run.before = await server.call("GET", "/stats")
                stream.runs.append(run)
                await _run_mode(server, stream.plan, run, send, log)
                run.stats = await server.call("GET", "/stats")
                run.instances = sorted(server.instances)
        if log and log.note:
            print(f"note: {log.note}", file=sys.stderr)


async def _sender(server: Server, stream: bool) -> Send:
    if not stream:
        return server.infer
    model = await server.model()

    async def send(request: PlannedRequest, start: float) -> Answer:
        return await server.stream(request, start, model)

    return send


async def _run_mode(server: Server, plan: Plan, run: ModeRun, send: Send, log: StepLog | None) -> None:
    if log:
        await log.skip()
    gc.collect()
    gc.freeze()  # a collection under way would hold up sends; what was there before need not be looked at
    start = time.perf_counter() + LEAD_S
    over = asyncio.Event()
    follower = asyncio.create_task(log.follow(run, start, over)) if log else None
    try:
        await fire(server, plan, run, send, start)
    finally:
        gc.unfreeze()
        over.set()
        if follower:
            await follower


def _show_and_write(streams: Sequence[Stream], args: argparse.Namespace, stopped: str) -> None:
    stats = streams[0].runs[0].stats
    parts = [f"{key} {stats[key]}" for key in ("model", "weights", "vocabulary", "device", "dtype") if key in stats]
    about = args.url + (f": {', '.join(parts)}" if parts else "")
    folder = args.report or args.out
    written: list[str] = []
    try:
        with _written_in(folder):  # before the tables: whoever reads those may stop reading, as `head` does
            for stream in streams:
                (folder / stream.folder).mkdir(exist_ok=True)
                write_plan(folder / stream.folder / "plan.json", stream.plan)
                written.append(write_results(folder / stream.folder, stream.runs))
            if args.report:
                written.append(write_report(folder, streams, args.goodput, about, stopped))
        if args.perfetto:
            written.append(_write_trace(args.perfetto, streams, about))
    finally:
        print(about)
        for stream in streams:
            print(f"{stream.plan.made or f'a plan of {len(stream.plan.requests)} requests'}, the same in every mode")
            print(f"\n{table(stream.runs, args.goodput)}\n")
            for line in warnings(stream.runs):
                print(f"warning: {line}")
        print("\n".join(written), flush=True)


async def ask_once(args: argparse.Namespace) -> int:
    """One request of the user's own; its completion and its times on stdout."""
    async with Server(args.url, args.api_key) as server:
        request = PlannedRequest(0, 0.0, args.prompt, args.numtokens, "immediate", args.seed)
        answer = await server.infer(request, time.perf_counter())
        if answer.error:
            # The same words for a missing server or key as everywhere; call() raises where the whole server is at fault.
            await server.call("GET", "/mode")
            return _fail(f"{answer.error}: {answer.message}" if answer.message else answer.error)
    print(answer.completion)
    times = [
        f"{answer.tokens} tokens in mode {answer.mode or '-'}",
        f"latency {answer.latency_s:.3f} s seen from here",
        f"{_seconds(answer.server_latency_s)} in the server",
        f"server TTFT {_seconds(answer.server_ttft_s)}",
    ]
    print("\n" + ", ".join(times))
    return 0


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


def _write_trace(path: Path, streams: Sequence[Stream], about: str) -> str:
    """A line that says so. Raises ClientError."""
    try:
        write_trace(path, [traced(stream.name, run) for stream in streams for run in each_of(stream.runs)], about)
    except OSError as error:
        raise ClientError(f"--perfetto {path}: {error.strerror or error}") from None
    return f"trace for ui.perfetto.dev: {path}"


def _make_folder(path: Path) -> None:
    """Before the run: an hour's results must not end at a folder that cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClientError(f"--out or --report {path}: cannot make this folder: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise ClientError(f"--out or --report {path}: this folder cannot be written")


@contextlib.contextmanager
def _written_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ClientError(f"cannot write the results in {folder}: {error.strerror or error}") from None


def _fail(text: str) -> int:
    print(f"client: {text}", file=sys.stderr)
    return 1
