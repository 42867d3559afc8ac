"""The command line of the simulator: arguments in, tables and files out. What is refused is one line that names the
argument."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NoReturn

from batching.policies import POLICIES
from batching.policy import Limits, Policy
from simulator.plans import Lengths, Plan, PlanError, poisson_plan, read_plan
from simulator.results import Run, everything, table
from simulator.routing import ROUTERS
from simulator.simulation import run
from simulator.step_times import ModelError, find_model, known_models
from simulator.virtual import PolicyFailed

MakePolicy = Callable[[], Policy]


class Wrong(ValueError):
    """An argument that will not do; the message is one line naming it."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Wrong(message)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when it did what was asked, 1 when it could not, 2 for bad arguments."""
    parser = Parser(
        prog="python -m simulator",
        description="The server's scheduler and policies in virtual time.",
        epilog="More of each: python -m simulator run --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_run(commands)
    try:
        args = parser.parse_args(argv)
        return int(args.do(args))
    except (Wrong, PlanError, ModelError) as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 2
    except (PolicyFailed, OSError) as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("simulator: stopped by Ctrl-C", file=sys.stderr)
        return 1


# ---- run


def _add_run(commands: Any) -> None:
    parser = commands.add_parser("run", help="serve a plan in virtual time, with one policy or several after another")
    _add_workload(parser)
    parser.add_argument(
        "--model",
        required=True,
        help=f"step times: a file that `calibrate` wrote, a table (.csv), or {', '.join(known_models())}",
    )
    parser.add_argument("--replicas", type=_whole, default=1, metavar="K", help="engines, each with all of the limits")
    parser.add_argument("--router", choices=ROUTERS, default="round-robin", help="which of several engines gets a request")
    parser.add_argument("--report", type=Path, metavar="DIR", help="results.json (the client's format) and results.png")
    parser.set_defaults(do=_run)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", required=True, metavar="NAME,...", help=f"one or several of {', '.join(POLICIES)}")
    parser.add_argument("--policy-arg", action="append", default=[], metavar="K=V", help="a policy's parameter; repeatable")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a plan.json of the client")
    parser.add_argument("--requests", type=_whole, metavar="N", help="or so many requests, drawn here")
    parser.add_argument(
        "--rate", type=_rate, default=10.0, metavar="R", help="of those a second, Poisson (10); inf: all at once"
    )
    parser.add_argument("--prompt", type=_lengths, default="64", metavar="N", help="tokens, 64 or 16-128 (64)")
    parser.add_argument("--output", type=_lengths, default="64", metavar="N", help="tokens, 64 or 16-128 (64)")
    parser.add_argument("--deferred", type=_share, default=0.0, metavar="SHARE", help="of the requests, 0 to 1 (0)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    names = ", ".join(f.name for f in fields(Limits))
    parser.add_argument("--limit", action="append", default=[], metavar="K=V", help=f"of the engine: {names}; repeatable")


def _run(args: argparse.Namespace) -> int:
    policies = _policies(args)
    model = find_model(args.model)
    model = replace(model, limits=_limits(args.limit, model.limits))
    plan = _plan(args)
    engines = f", {args.replicas} engines, {args.router}" if args.replicas > 1 else ""
    about = f"{model.about}{engines}"
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
    print(f"{about}\n{plan.made}\n", flush=True)
    watched = args.report is not None
    runs = [run(make, model, plan, replicas=args.replicas, router=args.router, watched=watched) for make in policies]
    print(table(runs))
    if args.report:
        _report(args.report, runs, about, plan.made)
    return 0


def _report(folder: Path, runs: Sequence[Run], about: str, made: str) -> None:
    (folder / "results.json").write_text(json.dumps(everything(runs, about, made)), encoding="utf-8")
    try:
        from simulator.plots import draw
    except ImportError:
        print("no plot: it needs matplotlib (requirements-bench.txt)", file=sys.stderr)
    else:
        draw(folder / "results.png", runs, f"{about}\n{made}")
    print(f"\nwritten to {folder}")


# ---- what the arguments mean


def _plan(args: argparse.Namespace, **reading: Any) -> Plan:
    if (args.plan is None) == (args.requests is None):
        raise Wrong("give either --plan or --requests")
    if args.plan:
        return read_plan(args.plan, **reading)
    return poisson_plan(args.requests, args.rate, args.prompt, args.output, deferred=args.deferred, seed=args.seed)


def _policies(args: argparse.Namespace) -> list[MakePolicy]:
    """A maker for each of --policy. An argument goes to every policy that has a parameter of that name."""
    names = [name.strip() for name in args.policy.split(",")]
    for name in names:
        if name not in POLICIES:
            raise Wrong(f"--policy: there is no {name!r}; there are {', '.join(POLICIES)}")
    if len(set(names)) < len(names):
        raise Wrong("--policy: a name stands there twice")
    given = _pairs("--policy-arg", args.policy_arg)
    known = {name: {f.name for f in fields(POLICIES[name].Params)} for name in names}
    for key in given:
        if not any(key in params for params in known.values()):
            there_are = ", ".join(sorted(set().union(*known.values()))) or "none"
            raise Wrong(f"--policy-arg: {key}: no such parameter of {', '.join(names)}; there are: {there_are}")
    makers: list[MakePolicy] = []
    for name in names:
        own = {key: value for key, value in given.items() if key in known[name]}
        try:
            POLICIES[name].from_arguments(own)
        except ValueError as error:
            raise Wrong(f"--policy-arg: {error}") from None
        makers.append(partial(POLICIES[name].from_arguments, own))
    return makers


def _limits(given: Sequence[str], limits: Limits) -> Limits:
    values: dict[str, Any] = {}
    kinds = {f.name: type(getattr(limits, f.name)) for f in fields(Limits)}
    for key, text in _pairs("--limit", given).items():
        if key not in kinds:
            raise Wrong(f"--limit: {key}: no such limit; there are {', '.join(kinds)}")
        try:
            values[key] = kinds[key](text)
        except ValueError:
            raise Wrong(f"--limit: {key}: must be a {'whole ' if kinds[key] is int else ''}number, not {text!r}") from None
    try:
        return replace(limits, **values)
    except ValueError as error:
        raise Wrong(f"--limit: {error}") from None


def _pairs(flag: str, given: Sequence[str]) -> Mapping[str, str]:
    pairs = [pair.partition("=") for pair in given]
    for name, _, value in pairs:
        if not name or not value:
            raise Wrong(f"{flag}: must be name=value, not {name!r}")
    return {name: value for name, _, value in pairs}


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _rate(text: str) -> float:
    return _within(text, 1e-9, inf, "a rate above 0")


def _share(text: str) -> float:
    return _within(text, 0, 1, "a number from 0 to 1")


def _within(text: str, low: float, high: float, told: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -inf
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be {told}, not {text!r}")
    return value


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
