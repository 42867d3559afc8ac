"""The command line of the simulator: arguments in, tables and files out. What is refused is one line that names the
argument."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from batching import policy_file
from batching.driver import describe_policy
from batching.policies import POLICIES
from batching.policy import Limits, Policy
from client.shared.perfetto import write_trace
from client.shared.plan import PlanError
from simulator.calibrate import LogError, busy_steps, make_again, make_steps, read_log, read_steps
from simulator.plans import Lengths, Plan, poisson_plan, read_plan
from simulator.results import Run, everything, repeats, shown, table, traced
from simulator.routing import ROUTERS
from simulator.simulation import run
from simulator.step_times import Linear, ModelError, errors, find_model, fit, known_models, write_model
from simulator.tables import StepTimeTable
from simulator.validate import Validation, on_engine, on_log, same_records
from simulator.virtual import PolicyFailed

if TYPE_CHECKING:
    from simulator.real import RealEngine

MakePolicy = Callable[[], Policy]
OF_ENGINE = ("max_batch_size", "token_budget", "max_queue", "num_blocks", "prefix_caching", "tbt_slo_ms")  # it finds the others
POOR_TOTAL, POOR_STEP = 0.1, 0.3  # errors of a law, as shares: of all steps together, of half of the single ones


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
    _add_calibrate(commands)
    _add_validate(commands)
    try:
        args = parser.parse_args(argv)
        return int(args.do(args))
    except (Wrong, PlanError, ModelError, LogError) as error:
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
    parser.add_argument(
        "--policy", required=True, metavar="NAME,...", help=f"one or several of {', '.join(POLICIES)}, or of files (mine.py)"
    )
    _add_workload(parser)
    parser.add_argument(
        "--model",
        required=True,
        help=f"step times: a file that `calibrate` wrote, a table (.csv), or {', '.join(known_models())}",
    )
    parser.add_argument("--replicas", type=_whole, default=1, metavar="K", help="engines, each with all of the limits")
    parser.add_argument("--router", choices=ROUTERS, default="round-robin", help="which of several engines gets a request")
    parser.add_argument("--repeat", type=_whole, default=1, metavar="N", help="with as many plans, of following seeds (1)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="results.json (the client's format) and results.png")
    parser.add_argument(
        "--perfetto", type=Path, metavar="FILE", help="steps, slots and requests as a trace for ui.perfetto.dev"
    )
    parser.set_defaults(do=_run)


def _add_workload(parser: argparse.ArgumentParser) -> None:
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
    _add_limit(parser)


def _add_limit(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(f.name for f in fields(Limits))
    parser.add_argument("--limit", action="append", default=[], metavar="K=V", help=f"of the engine: {names}; repeatable")


def _run(args: argparse.Namespace) -> int:
    policies = _policies(args)
    model = find_model(args.model)
    model = replace(model, limits=_limits(args.limit, model.limits))
    if isinstance(model.step_time, StepTimeTable) and model.limits.max_batch_size > model.step_time.tables[0].largest:
        raise Wrong(f"--limit: max_batch_size: the table ends at batches of {model.step_time.tables[0].largest}")
    if args.repeat > 1 and args.plan:
        raise Wrong("--repeat goes with --requests: a plan of a file is the same each time")
    plan = _plan(args)
    engines = f", {args.replicas} engines, {args.router}" if args.replicas > 1 else ""
    about = f"{model.about}{engines}"
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
    made = plan.made + (f", and the {args.repeat - 1} after it" if args.repeat > 1 else "")
    print(f"{about}\n{made}\n", flush=True)
    watched = args.report is not None or args.perfetto is not None
    runs: list[Run] = []
    for number in range(1, args.repeat + 1):
        for make in policies:
            once = run(make, model, plan, replicas=args.replicas, router=args.router, watched=watched)
            runs.append(replace(once, repeat=number))
        args.seed += 1
        plan = _plan(args) if number < args.repeat else plan
    print(table(shown(runs)))
    if args.repeat > 1:
        print(f"\n{repeats(runs)}")
    if args.report:
        _report(args.report, runs, about, made)
    if args.perfetto:
        if args.replicas > 1:
            _say("the trace has the requests only: the steps of several engines are not recorded")
        write_trace(args.perfetto, [traced(run) for run in runs], f"{about}; {made}")
        print(f"\ntrace for ui.perfetto.dev: {args.perfetto}")
    return 0


def _report(folder: Path, runs: Sequence[Run], about: str, made: str) -> None:
    (folder / "results.json").write_text(json.dumps(everything(runs, about, made)), encoding="utf-8")
    try:
        from simulator.plots import draw
    except ImportError:
        print("no plot: it needs matplotlib (requirements-bench.txt)", file=sys.stderr)
    else:
        draw(folder / "results.png", shown(runs), f"{about}; {made}")
    print(f"\nwritten to {folder}")


# ---- calibrate and validate


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser("calibrate", help="fit the law of step times to a real engine's steps")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="a running server, by its newest step records")
    source.add_argument("--log", type=Path, metavar="FILE", help="what ./server.sh MODE --input-log FILE wrote")
    _add_engine(parser, source)
    _add_limit(parser)
    parser.add_argument("--api-key", default="", help="the server's")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model file, .json")
    parser.set_defaults(do=_calibrate)


def _add_validate(commands: Any) -> None:
    parser = commands.add_parser("validate", help="the same requests on a real engine and in virtual time")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--log", type=Path, metavar="FILE", help="a server's run, by its input log; policy, plan and limits too"
    )
    _add_engine(parser, source)
    _add_workload(parser)
    parser.add_argument("--policy", metavar="NAME", help="on the engine (dynamic)")
    parser.add_argument("--runs", type=_whole, default=3, metavar="N", help="real ones (3)")
    parser.add_argument("--model", help="step times, as `calibrate` wrote them; by default fitted between the real runs")
    parser.add_argument("--url", help="with --log: that server, whose step records have to be those of its log")
    parser.add_argument("--api-key", default="", help="the server's")
    parser.add_argument("--out", type=Path, metavar="FILE", help="all figures, as JSON")
    parser.set_defaults(do=_validate)


def _add_engine(parser: argparse.ArgumentParser, source: Any) -> None:
    source.add_argument("--engine", metavar="NAME", help="a model, loaded here: demo, gpt2-medium, ...")
    parser.add_argument(
        "--weights", metavar="X", help="of --engine: pretrained, random, or a folder (random; demo: pretrained)"
    )
    parser.add_argument("--dtype", default="auto", help="of --engine (auto)")


def _engine(args: argparse.Namespace) -> "RealEngine":
    limits, given = _limits(args.limit, Limits(max_queue=10**6, num_blocks=10**9)), _pairs("--limit", args.limit)
    for name in given:
        if name not in OF_ENGINE:
            raise Wrong(f"--limit: {name}: --engine finds it out by itself; to be given are {', '.join(OF_ENGINE)}")
    tbt_slo_ms = limits.tbt_slo_ms if "tbt_slo_ms" in given else None
    # As for the server (app.py): torch's threads would spin while they wait, which is dear where anything else computes. It
    # counts before torch is loaded, which nothing else here needs.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    from simulator.real import RealEngine

    weights = args.weights or ("pretrained" if args.engine == "demo" else "random")
    try:
        engine = RealEngine(args.engine, weights, args.dtype, limits, tbt_slo_ms)
    except Exception as error:  # of a checkpoint, a device, a memory
        raise Wrong(f"--engine {args.engine}: {error}") from None
    print(engine.about, flush=True)
    return engine


def _calibrate(args: argparse.Namespace) -> int:
    if args.limit and not args.engine:
        raise Wrong("--limit goes with --engine: a server has its own")
    if args.url:
        records, limits = read_steps(args.url, args.api_key)
        steps, about = busy_steps(records), f"{len(records)} step records of {args.url}"
    elif args.log:
        logged = make_again(read_log(args.log), str(args.log))
        steps, limits, about = logged.seconds, logged.limits, str(args.log)
    else:
        engine = _engine(args)
        steps, limits, about = make_steps(engine, 0, _say), engine.limits, engine.about
    law = fit(steps)
    write_model(args.out, law, limits, about)
    names = ("a step", "a prefill token", "a decode", "a KV column of it", "chunk x context")
    told = [
        *zip(law.coefficients, names, strict=True),
        *zip(law.single, ("a step of one decode", "a KV column of it"), strict=False),
    ]
    print("\n".join(f"{1e6 * b:12.4f} us  {name}" for b, name in told))
    apart = errors(law, steps)
    print(f"{len(steps)} steps; the law is {apart}\nwritten to {args.out}")
    if abs(apart.total) > POOR_TOTAL or apart.p50 > POOR_STEP:
        _say(f"the law is poor: it should be within {POOR_TOTAL:.0%} in all, and half of the steps within {POOR_STEP:.0%}")
    return 0


def _validate(args: argparse.Namespace) -> int:
    if args.log and (args.plan or args.requests or args.policy or args.policy_arg or args.limit):
        raise Wrong("--log: the log says which policy, which requests and which limits")
    if args.url and not args.log:
        raise Wrong("--url goes with --log")
    law = _law(args.model) if args.model else None
    if args.log:
        checked = _validate_log(args, law)
    else:
        args.policy = args.policy or "dynamic"
        make_policy, *others = _policies(args)
        if others:
            raise Wrong("--policy: one is validated at a time")
        plan = _plan(args)
        engine = _engine(args)
        if args.plan:
            plan = read_plan(args.plan, engine.encode)
        print(plan.made, flush=True)
        checked, law = on_engine(engine, make_policy, plan, args.runs, law, _say)
    print(f"\n{checked.text()}")
    if args.out:
        args.out.write_text(json.dumps(checked.everything(), indent=1) + "\n", encoding="utf-8")
    return 0 if checked.good else 1


def _validate_log(args: argparse.Namespace, law: Linear | None) -> Validation:
    logged = make_again(read_log(args.log), str(args.log))
    if args.url:
        try:
            shared = same_records(logged, read_steps(args.url, args.api_key)[0])
        except ValueError as error:
            raise Wrong(f"--url: {error}") from None
        _say(f"{shared} step records of the server are those of the plans made again from its log")
    if logged.unlike:
        raise Wrong(f"{args.log}: has a {logged.unlike[0]}: its plans were made again, but it cannot be simulated")
    record = describe_policy(logged.policy)
    make_policy = partial(POLICIES[record["mode"]].from_arguments, record["params"])
    return on_log(logged, make_policy, law or fit(logged.seconds))


def _law(name: str) -> Linear:
    step_time = find_model(name).step_time
    if not isinstance(step_time, Linear):
        raise Wrong(f"--model {name}: must be a law that `calibrate` wrote")
    return step_time


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- what the arguments mean


def _plan(args: argparse.Namespace) -> Plan:
    if (args.plan is None) == (args.requests is None):
        raise Wrong("give either --plan or --requests")
    if args.plan:
        return read_plan(args.plan)
    return poisson_plan(args.requests, args.rate, args.prompt, args.output, deferred=args.deferred, seed=args.seed)


def _policies(args: argparse.Namespace) -> list[MakePolicy]:
    """A maker for each of --policy. An argument goes to every policy that has a parameter of that name."""
    try:
        names = [policy_file.mode_named(name.strip()) for name in args.policy.split(",")]
    except ValueError as error:
        raise Wrong(f"--policy: {error}") from None
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
            policy_file.make(name, own)
        except ValueError as error:
            raise Wrong(f"--policy-arg: {error}") from None
        makers.append(partial(POLICIES[name].from_arguments, own))
    return makers


def _limits(given: Sequence[str], limits: Limits) -> Limits:
    values: dict[str, Any] = {}
    numbers = {name: value for name, value in asdict(limits).items() if isinstance(value, int | float)}
    kinds = {name: float if isinstance(value, float) else int for name, value in numbers.items()}
    for key, text in _pairs("--limit", given).items():
        if key not in kinds:
            raise Wrong(f"--limit: {key}: no such limit; there are {', '.join(kinds)}")
        if isinstance(numbers[key], bool) and text not in ("0", "1"):
            raise Wrong(f"--limit: {key}: must be 0 or 1, not {text!r}")
        try:
            values[key] = text == "1" if isinstance(numbers[key], bool) else kinds[key](text)
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
