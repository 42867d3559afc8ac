"""What the programs of `benchmarks` and `teaching/examples` have in common: arguments that begin with the file's own docstring,
tables, CSV and charts. The last three are those of the client and the simulator (`client/shared`).
"""

import argparse
from pathlib import Path

from client.shared.tables import middle, show, text, with_spread, write_csv

__all__ = ["add_model", "add_out", "add_repeat", "arguments", "middle", "show", "text", "with_spread", "write_csv"]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the file's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model(parser: argparse.ArgumentParser, model: str) -> None:
    """Which model a program loads, with random weights."""
    parser.add_argument("--model", default=model)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")


def add_repeat(parser: argparse.ArgumentParser, repeat: int) -> None:
    """How often what is compared is run, in turn."""
    parser.add_argument("--repeat", type=int, default=repeat, metavar="N", help=f"runs of each, in turn ({repeat})")


def add_out(parser: argparse.ArgumentParser) -> None:
    """Where a table as CSV and a chart go."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the figures as CSV and a chart (matplotlib) there")
