"""The command line and client/.env, checked once: a bad value is one line on stderr and exit status 2.

It must not talk to the server: which modes there are is the server's to say.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from dotenv import dotenv_values

from client.arrivals import read_arrivals
from client.lengths import read_lengths
from client.metrics import LIMITS
from client.traces import TraceError, TraceRow, read_trace, window
from client.workload import SELECTIONS, Workload

PORT = 8500
COUNT = 100
RATE = 10.0  # requests a second, where neither --rate nor --duration says
NUMTOKENS = (1, 25, 50, 100)
MAX_BINS = 100_000
ENV_FILE = Path(__file__).with_name(".env")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """All flags, with ``url`` and ``api_key`` filled in from the environment or client/.env, and ``stream`` decided."""
    parser = _parser()
    given = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")}
    args = parser.parse_args(argv)
    if args.prompt is not None and args.numtokens is None:
        parser.error("--prompt needs --numtokens N: how many tokens to generate")
    if args.results and not (args.report or args.perfetto):
        parser.error("--results needs --report DIR or --perfetto FILE: what to make of them")
    if args.prompt is None and args.numtokens is not None:
        parser.error("--numtokens goes with --prompt; for a run of many requests use --numtokens_range")
    if args.prompt is not None and (args.modes or args.deferred):
        parser.error("--prompt sends a single request: leave out --modes and --deferred")
    _check_combination(parser, given)

    if len(dict(args.arrivals)) < len(args.arrivals):
        parser.error("--arrivals: the same is there twice")

    needs_stream = bool(args.report or {"ttft", "tpot"} & args.goodput.keys())
    if args.stream is False and {"ttft", "tpot"} & args.goodput.keys():
        parser.error("--goodput: ttft and tpot are known only where answers are streamed: leave out --no-stream")
    args.stream = needs_stream if args.stream is None else args.stream
    args.url = args.url or f"http://{_setting('IP') or '127.0.0.1'}:{PORT}"
    if not _is_http(args.url):
        parser.error(f"{args.url!r} is no address of a server: give --url http://HOST:PORT, or the host alone as IP")
    args.api_key = _setting("API_KEY")
    if not (args.api_key.isascii() and args.api_key.isprintable()):
        parser.error("API_KEY may hold plain ASCII characters only")
    return args


def read_workloads(args: argparse.Namespace) -> dict[str, Workload]:
    """What the flags say plans are drawn from, by the name of the arrivals where there are several. Raises TraceError."""
    count = COUNT if args.numsamples is None else args.numsamples
    rows: list[TraceRow] = []
    left_out, speed = 0, args.speed
    if args.trace:
        most = math.inf if args.trace_hours and args.numsamples is None else count
        rows, left_out = window(read_trace(args.trace), args.trace_from, args.trace_hours or math.inf, most)
        count, speed = len(rows), _speed(rows, args.rate) if args.rate else args.speed
    workload = Workload(
        count=count,
        seed=args.seed,
        wait_s=args.wait,
        duration_s=count / (args.rate or RATE) if args.duration is None else args.duration,
        bins=args.bins,
        users=args.users,
        trace=tuple(rows),
        rows_left_out=left_out,
        speed=speed,
        prompt_lengths=args.prompt_lengths,
        output_lengths=args.output_lengths
        or (None if args.trace and not args.numtokens_range else tuple(args.numtokens_range or NUMTOKENS)),
        selection=args.selection,
        deferred_share=args.deferred,
        context=args.context,
    )
    several = len(args.arrivals) > 1
    named = {text if several else "": replace(workload, arrivals=arrivals) for text, arrivals in args.arrivals}
    return named or {"": workload}


def _speed(rows: Sequence[TraceRow], rate: float) -> float:
    """How many times as fast as in the trace they come at ``rate`` a second on average."""
    gaps, span_s = len(rows) - 1, rows[-1].at_s
    if gaps and not span_s:
        raise TraceError("--rate: the requests of the trace all come at once")
    return span_s * rate / gaps if gaps else 1.0


# A flag that has nothing to say beside another one would be ignored: it is refused instead.
WORKLOAD_FLAGS = (
    "--numsamples", "--wait", "--arrivals", "--rate", "--duration", "--bins", "--users", "--trace", "--trace-from",
    "--trace-hours", "--speed", "--numtokens_range", "--prompt-lengths", "--output-lengths", "--selection", "--deferred",
    "--context", "--seed",
)  # fmt: skip
APART = (
    (
        "--results",
        (*WORKLOAD_FLAGS, "--plan", "--plan-only", "--prompt", "--modes", "--repeat", "--stream", "--url"),
        "nothing is sent",
    ),
    ("--plan", WORKLOAD_FLAGS, "the plan says it all"),
    (
        "--users",
        ("--wait", "--arrivals", "--rate", "--duration", "--bins", "--trace", "--trace-from", "--trace-hours", "--speed"),
        "users send when they are free",
    ),
    ("--trace", ("--wait", "--arrivals", "--duration", "--bins"), "the trace has its own times; see --speed and --rate"),
    ("--arrivals", ("--wait",), "the arrivals say when"),
    ("--rate", ("--duration", "--speed"), "one follows from the other"),
    ("--output-lengths", ("--numtokens_range",), "both say how long outputs are"),
    (
        "--prompt",
        ("--plan", "--plan-only", "--report", "--perfetto", "--goodput", "--repeat", "--stream"),
        "it sends a single request",
    ),
    ("--plan-only", ("--perfetto", "--repeat"), "nothing is sent"),
)
NEEDED = {
    "--results": ("--report", "--perfetto"),
    "--rate": ("--arrivals", "--trace"),
    "--duration": ("--arrivals",),
    "--bins": ("--arrivals",),
    "--speed": ("--trace",),
    "--trace-from": ("--trace",),
    "--trace-hours": ("--trace",),
}


def _check_combination(parser: argparse.ArgumentParser, given: set[str]) -> None:
    for flag, others, why in APART:
        for other in others:
            if {flag, other} <= given:
                parser.error(f"{other} cannot go with {flag}: {why}")
    for flag, needed in NEEDED.items():
        if flag in given and given.isdisjoint(needed):
            parser.error(f"{flag} goes with {' or '.join(needed)}")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="client.py",
        description="Fire the same seeded requests at a BatchLab server in one mode or several, and compare.",
        epilog="The server's address and key come from IP and API_KEY in client/.env, or from the environment. docs/client.md "
        "explains arrivals and lengths and shows what comes out.",
        allow_abbrev=False,  # --mode for --modes would look as if it had been a flag
    )
    add = parser.add_argument_group("what is sent").add_argument
    add("--numsamples", type=_count, metavar="N", help=f"how many requests (default {COUNT}; with --trace-hours all of them)")
    add("--wait", type=_wait, default=1.0, metavar="S", help="pause 0..S seconds, at random, between sends (default 1)")
    add(
        "--arrivals",
        type=_spec(lambda text: (text, read_arrivals(text))),
        nargs="+",
        default=[],
        metavar="A",
        help="instead of --wait, one or several: low, medium or high bursts; OUTER/INNER, as in zipf:a=1.2/uniform; "
        "gamma:burstiness=0.5; constant; at-once",
    )
    add(
        "--rate",
        type=_positive,
        metavar="R",
        help=f"with --arrivals or --trace: requests a second on average (default {RATE:g}, or as in the trace)",
    )
    add("--duration", type=_positive, metavar="S", help="with --arrivals: seconds, instead of --rate")
    add("--bins", type=_bins, default=20, metavar="G", help="with --arrivals: how many a burst's time is cut into (default 20)")
    add("--users", type=_count, metavar="N", help="closed loop: N users, each waits for an answer before the next request")
    add("--trace", type=Path, metavar="FILE", help="replay a CSV or JSON trace; the first --numsamples of its requests")
    add("--trace-from", type=_wait, default=0.0, metavar="H", help="with --trace: from its hour H on (default 0)")
    add("--trace-hours", type=_positive, metavar="H", help="with --trace: so many hours of it")
    add("--speed", type=_positive, default=1.0, metavar="X", help="with --trace: X times as fast (default 1)")
    add(
        "--numtokens_range",
        type=_count,
        nargs="+",
        metavar="N",
        help="the output lengths to choose from, in tokens (default 1 25 50 100, or a trace's own)",
    )
    add(
        "--output-lengths",
        type=_spec(read_lengths),
        metavar="D",
        help="instead: fixed:tokens=N, uniform:low=N,high=N, normal:mean=N,std=N, zipf:a=X",
    )
    add("--prompt-lengths", type=_spec(read_lengths), metavar="D", help="likewise (default short sentences, or a trace's own)")
    add("--context", type=_count, default=512, metavar="N", help="longer prompts and outputs are cut (default 512: demo's)")
    add("--selection", choices=SELECTIONS, default="random", help="lengths in random order, or those longest first")
    add("--deferred", type=_share, default=0.0, metavar="SHARE", help="0..1 of the requests are deferred (default 0)")
    add("--seed", type=_int, default=0, metavar="N", help="of everything drawn (default 0)")
    add("--plan", type=Path, metavar="FILE", help="send the requests of a plan.json instead")
    add("--plan-only", action="store_true", help="write plan.json and plan.png, and send nothing")
    add("--results", type=Path, metavar="FILE", help="send nothing: show a results.json again, also the simulator's")
    add("--prompt", metavar="TEXT", help="send this one request and print its completion; needs --numtokens")
    add("--numtokens", type=_count, metavar="N", help="tokens to generate for --prompt")
    add = parser.add_argument_group("how, and what comes of it").add_argument
    add("--modes", type=_modes, metavar="A,B", help="modes to compare, with commas (default: the one the server is in)")
    add("--repeat", type=_count, default=1, metavar="N", help="fire the plan N times in each mode, in turn (default 1)")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="by /v1/completions, for TTFT, TPOT and ITL as a user sees them (default: where --report or --goodput need it); "
        "else by /inference, answered as a whole",
    )
    add(
        "--goodput",
        type=_limit,
        nargs="+",
        action=_Limits,
        default={},
        metavar="NAME:S",
        help=f"count the requests that keep these limits in seconds, of {', '.join(LIMITS)}: ttft:0.5 tpot:0.1",
    )
    add(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="for results.csv, plan.json and latency.png, overwritten",
    )
    add("--report", type=Path, metavar="DIR", help="write report.html, its pictures and all figures to DIR instead")
    add("--perfetto", type=Path, metavar="FILE", help="write steps, sequence slots and requests as a trace for ui.perfetto.dev")
    add("--url", metavar="URL", help=f"the server (default http://IP:{PORT})")
    return parser


class _Limits(argparse.Action):
    """--goodput's pairs as one dictionary."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, dict(values))


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _count(text: str) -> int:
    number = _int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def _spec(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument that ``read`` reads, its ValueError as argparse shows it."""

    def parse(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in LIMITS or not value:
        raise argparse.ArgumentTypeError(f"must be NAME:SECONDS with a name of {', '.join(LIMITS)}, not {text!r}")
    return name, _positive(value)


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of more than 0, not {text!r}")
    return value


def _bins(text: str) -> int:
    bins = _count(text)
    if bins > MAX_BINS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_BINS}, not {text}")
    return bins


def _wait(text: str) -> float:
    seconds = _number(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0 on, not {text}")
    return seconds


def _share(text: str) -> float:
    share = _number(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {text}")
    return share


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def _modes(text: str) -> list[str]:
    modes = [mode.strip().removesuffix(".py").rpartition("/")[2] for mode in text.split(",")]  # a policy's file by its name
    if not all(modes) or len(set(modes)) < len(modes):
        raise argparse.ArgumentTypeError(f"must be different names with commas between them, not {text!r}")
    return modes


def _setting(name: str) -> str:
    """From the environment, else from client/.env, else empty."""
    value = os.environ.get(name)
    if value is None:
        value = dotenv_values(ENV_FILE, encoding="utf-8-sig").get(name)
    return (value or "").strip()


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unfinished [IPv6] address
        return False
