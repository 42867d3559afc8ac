"""The command line and client/.env, checked once: a bad value is one line on stderr and exit status 2.

It must not talk to the server: which modes there are is the server's to say.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from dotenv import dotenv_values
from workload import SELECTIONS

PORT = 8500
ENV_FILE = Path(__file__).with_name(".env")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """All flags, with ``url`` and ``api_key`` filled in from the environment or client/.env."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.prompt is not None and args.numtokens is None:
        parser.error("--prompt needs --numtokens N: how many tokens to generate")
    if args.prompt is None and args.numtokens is not None:
        parser.error("--numtokens goes with --prompt; for a run of many requests use --numtokens_range")
    if args.prompt is not None and (args.modes or args.deferred):
        parser.error("--prompt sends a single request: leave out --modes and --deferred")

    args.url = args.url or f"http://{_setting('IP') or '127.0.0.1'}:{PORT}"
    if not _is_http(args.url):
        parser.error(f"{args.url!r} is no address of a server: give --url http://HOST:PORT, or the host alone as IP")
    args.api_key = _setting("API_KEY")
    if not (args.api_key.isascii() and args.api_key.isprintable()):
        parser.error("API_KEY may hold plain ASCII characters only")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="client.py",
        description="Fire the same seeded requests at a BatchLab server in one mode or several, and compare.",
        epilog="The server's address and key come from IP and API_KEY in client/.env, or from the environment.",
        allow_abbrev=False,  # --mode for --modes would look as if it had been a flag
    )
    add = parser.add_argument
    add("--numsamples", type=_count, default=100, metavar="N", help="how many requests (default 100)")
    add("--wait", type=_wait, default=1.0, metavar="S", help="pause 0..S seconds, at random, between sends (default 1)")
    add(
        "--numtokens_range",
        type=_count,
        nargs="+",
        default=[1, 25, 50, 100],
        metavar="N",
        help="the lengths to choose from, in tokens (default 1 25 50 100)",
    )
    add("--selection", choices=SELECTIONS, default="random", help="lengths in random order, or those longest first")
    add("--deferred", type=_share, default=0.0, metavar="SHARE", help="0..1 of the requests are deferred (default 0)")
    add("--modes", type=_modes, metavar="A,B", help="modes to compare, with commas (default: the one the server is in)")
    add("--seed", type=_int, default=0, metavar="N", help="of everything drawn (default 0)")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="for results.csv and latency.png, overwritten")
    add("--prompt", metavar="TEXT", help="send this one request and print its completion; needs --numtokens")
    add("--numtokens", type=_count, metavar="N", help="tokens to generate for --prompt")
    add("--url", metavar="URL", help=f"the server (default http://IP:{PORT})")
    return parser


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
    modes = [mode.strip() for mode in text.split(",")]
    if not all(modes) or len(set(modes)) < len(modes):
        raise argparse.ArgumentTypeError(f"must be different names with commas between them, not {text!r}")
    return modes


def _setting(name: str) -> str:
    """From the environment, else from client/.env, else empty."""
    value = os.environ.get(name)
    if value is None:
        value = dotenv_values(ENV_FILE).get(name)
    return (value or "").strip()


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unfinished [IPv6] address
        return False
