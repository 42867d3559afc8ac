"""What each scheme is for, in one picture: a workload that shows it, the scheme, and those that it improves upon.

    python -m teaching.examples.schemes --out schemes

In virtual time, by the policy files of the server: nothing depends on the machine. Where the workload is drawn, figures are
medians of so many repeats with other seeds, and how far these are apart; the chart has the first. A step takes 5 ms, 0.3 ms a
prompt token, 0.8 ms a decode, and what attention takes: a law of the size of a GPT's, made up for this table. `deadline` runs
on the tables of the CENG523 project, and prefixes are those of `prefix.py`. `mixed` has its own: `benchmarks/mixed.py`.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, TypeVar

from batching.policies import POLICIES
from batching.policies.support.capacity import Shape, capacity
from batching.policy import Limits
from batching.request import Request
from batching.step import Step
from batching.step_time import Load, StepTime
from benchmarks.program import add_out, add_repeat, arguments, text, with_spread, write_csv
from simulator.step_times import Linear
from simulator.tables import CENG523_VARIANTS, KnownStepTime, ceng523
from simulator.virtual import simulate
from teaching.examples import deadline, prefix

LAW = Linear((0.005, 3e-4, 8e-4, 1e-6, 1e-7))
SLO_MS = 50.0
TALKERS, LONG_PROMPT, COMES_AT = 8, 1000, 0.5
SHORT = 16  # tokens: what counts as a short job
RATES = range(50, 401, 25)
REQUESTS = 5000  # at each of them
CAPTION = """Six workloads in virtual time, each with the scheme that it is for and those that the scheme improves upon.
Above: how long a prompt stops everybody else; how even steps are; what short jobs wait. Below: what padding wastes (red); what
is computed of prompts that begin alike; which model answers as the load grows. Dotted: the limit, what would do, and the rates
that each model can carry."""
T = TypeVar("T")
Gaps = list[tuple[float, float]]  # when a token came, and how long after the one before


def main() -> None:
    parser = arguments(__doc__)
    add_repeat(parser, 3)
    add_out(parser)
    args = parser.parse_args()
    stalls = {
        "orca": gaps("orca"),
        "sarathi": gaps("sarathi", {"tbt_slo_ms": SLO_MS}),
        "flover, two lanes": gaps("flover", lanes=2),
    }
    seeds = range(args.repeat)
    sizes = {mode: [step_sizes(mode, seed) for seed in seeds] for mode in ("orca", "splitfuse")}
    latencies = {mode: [mean_latencies(mode, seed) for seed in seeds] for mode in ("orca", "dynamic", "fastserve")}
    batched: dict[str, tuple[str, dict[str, Any]]] = {
        "static": ("static", {}),
        "sequence, lengths\noff by 30%": ("sequence", {"predictor": "noisy", "error": 0.3}),
        "sequence, lengths\nknown": ("sequence", {}),
    }
    padding = {name: [slot_steps(mode, params, seed) for seed in seeds] for name, (mode, params) in batched.items()}
    prefills, needed = prefill_tokens(seeds)
    shares = [variant_shares(rate) for rate in RATES]

    print(f"the longest gap between tokens of {TALKERS} requests when a prompt of {LONG_PROMPT} tokens comes")
    show([["mode", "ms"], *([mode, f"{1e3 * max(gap for _, gap in found):.0f}"] for mode, found in stalls.items())])
    print("tokens in a step while there is a backlog, budget 256")
    levels = {mode: [quantiles([tokens for _, tokens in one], n=20)[::9] for one in found] for mode, found in sizes.items()}
    show([["mode", "p5", "p50", "p95"], *([mode, *spreads(found, 0)] for mode, found in levels.items())])
    print(f"mean latency (s) of jobs of up to {SHORT} tokens, of longer ones, of all")
    show([["mode", "short", "longer", "all"], *([mode, *spreads(found, 2)] for mode, found in latencies.items())])
    print("slot-steps with a token, and without")
    show([["mode", "with", "without"], *([" ".join(mode.split()), *spreads(found, 0)] for mode, found in padding.items())])
    print(f"prompt tokens computed with memory for seven requests; {needed} would do")
    show([["mode", "tokens"], *([" ".join(mode.split()), with_spread(found, 0)] for mode, found in prefills.items())])
    print(f"requests answered in time by each variant, and late, of {REQUESTS} at each rate")
    rows = ([f"{rate}/s", *(f"{part:.1%}" for part in share)] for rate, share in zip(RATES, shares, strict=True))
    show([["rate", *CENG523_VARIANTS, "late"], *rows])
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_figures(args.out / "schemes.csv", {"latency_s": latencies, "slot_steps": padding, "prefill_tokens": prefills})
        draw(args.out / "schemes.png", stalls, first(sizes), first(latencies), first(padding), first(prefills), needed, shares)
        print(f"written to {args.out}")


def first(repeats: Mapping[str, Sequence[T]]) -> dict[str, T]:
    """The first repeat of each mode."""
    return {mode: found[0] for mode, found in repeats.items()}


def show(rows: list[list[str]]) -> None:
    print(text(rows) + "\n")


def spreads(repeats: Sequence[Sequence[float]], digits: int) -> list[str]:
    """Column by column over the repeats."""
    return [with_spread(column, digits) for column in zip(*repeats, strict=True)]


def write_figures(path: Path, tables: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    """A line for each figure, mode and repeat."""
    write_csv(
        path,
        (
            {"figure": figure, "mode": " ".join(mode.split()), "repeat": repeat, "value": value}
            for figure, by_mode in tables.items()
            for mode, repeats in by_mode.items()
            for repeat, value in enumerate(repeats, 1)
        ),
    )


def serve(mode: str, params: dict[str, Any], limits: Limits, requests: list[Request]) -> list[Step]:
    """The steps in which a policy serves them; it knows the law."""
    steps: list[Step] = []
    known = StepTime()
    for decodes in (0, 1, 4, 16):
        for chunk, context in ((0, 10), (7, 0), (60, 0), (200, 0), (60, 400)):
            load = Load.of([(1, context)] * decodes + [(chunk, context)] * (chunk > 0))
            for _ in range(5):
                known.observe(load, LAW.seconds(load))
    policy = POLICIES[mode].from_arguments(params)
    simulate(policy, limits, requests, lambda step: LAW.seconds(step.load), on_step=steps.append, known=[known])
    return steps


def gaps(mode: str, params: dict[str, Any] | None = None, lanes: int = 1) -> Gaps:
    talking = [Request(f"{i}", [0] * 20, 100) for i in range(TALKERS)]
    limits = Limits(max_batch_size=16, max_context=2048, num_blocks=400, lanes=lanes)
    serve(mode, params or {}, limits, [*talking, Request("long", [0] * LONG_PROMPT, 10, arrival=COMES_AT)])
    return sorted((later, later - earlier) for req in talking for earlier, later in pairwise(req.token_times))


def step_sizes(mode: str, seed: int) -> list[tuple[float, int]]:
    """When each step was planned, and its tokens, while somebody's prompt is not done: more come than can be served."""
    rng, at, requests = random.Random(3 + seed), 0.0, []
    for i in range(150):
        at += rng.expovariate(20.0)
        requests.append(Request(f"{i}", [0] * rng.randint(10, 400), rng.randint(1, 60), arrival=at))
    limits = Limits(max_batch_size=128, token_budget=256, max_context=1024, num_blocks=100_000)
    steps = serve(mode, {}, limits, requests)
    last = max(i for i, step in enumerate(steps) if any(row.start == 0 for row in step.rows))
    return [(step.planned_at, step.num_tokens) for step in steps[:last]]


def mean_latencies(mode: str, seed: int) -> tuple[float, float, float]:
    """Of short jobs, long ones, and all: seven of ten generate 4 to 16 tokens, one in ten more than 70 (Pareto, shape 0.8)."""
    rng, at, requests = random.Random(1 + seed), 0.0, []
    for i in range(400):
        at += rng.expovariate(21.0)
        output = min(240, int(4 * rng.paretovariate(0.8)))
        requests.append(Request(str(i), [0] * rng.randint(5, 60), output, arrival=at))
    serve(mode, {}, Limits(max_batch_size=8, token_budget=256, max_context=300, num_blocks=2000), requests)
    short = [latency(req) for req in requests if req.max_tokens <= SHORT]
    long = [latency(req) for req in requests if req.max_tokens > SHORT]
    return mean(short), mean(long), mean(short + long)


def latency(req: Request) -> float:
    assert req.answered_at is not None
    return req.answered_at - req.arrival


def slot_steps(mode: str, params: dict[str, Any], seed: int) -> tuple[int, int]:
    """With a token of somebody, and without: 256 requests, half of 1 to 40 tokens, half of 100 to 400."""
    rng = random.Random(7 + seed)
    lengths = [rng.choice((rng.randint(1, 40), rng.randint(100, 400))) for _ in range(256)]
    requests = [Request(str(i), [0] * 5, length) for i, length in enumerate(lengths)]
    limits = Limits(max_batch_size=64, num_blocks=100_000)
    rows = [row for step in serve(mode, {"batch_timeout_ms": 0} | params, limits, requests) for row in step.rows]
    useful = sum(row.count > 0 for row in rows)
    return useful, len(rows) - useful


def prefill_tokens(seeds: Sequence[int]) -> tuple[dict[str, list[int]], int]:
    """Those computed by `teaching/examples/prefix.py` with little memory; and how many the prefixes leave to be computed."""
    names = {("dynamic", False): "dynamic,\nno cache", ("dynamic", True): "dynamic", ("batchllm", True): "batchllm"}
    families, members, shared, own = 24, 12, 256, 40
    found = {
        name: [prefix.run(mode, caching, 160, prefix.offline_batch(families, members, shared, own, seed))[0] for seed in seeds]
        for (mode, caching), name in names.items()
    }
    return found, families * (shared + members * own)


def variant_shares(rate: float) -> list[float]:
    """Of the requests: those that each variant answered in time, and the late."""
    found = deadline.outcome(deadline.run(deadline.online(), ceng523(), rate, REQUESTS))
    return [found.served[variant] / REQUESTS for variant in range(len(CENG523_VARIANTS))] + [found.late / REQUESTS]


def draw(
    path: Path,
    stalls: dict[str, Gaps],
    sizes: dict[str, list[tuple[float, int]]],
    latencies: dict[str, tuple[float, float, float]],
    padding: dict[str, tuple[int, int]],
    prefills: dict[str, int],
    needed: int,
    shares: Sequence[Sequence[float]],
) -> None:
    from client.shared import style

    def colour(label: str) -> str:
        return style.colour(label.partition(",")[0])

    @style.in_both_themes
    def drawn(path: Path) -> None:
        figure = style.figure(13, 8, "What each scheme is for", CAPTION)
        (stall, size, wait), (waste, shared, variants) = figure.subplots(2, 3)
        ink, red = style.theme().ink, style.theme().waste

        for mode, found in stalls.items():
            stall.step([time for time, _ in found], [1e3 * gap for _, gap in found], lw=1.5, color=colour(mode), label=mode)
        stall.axhline(SLO_MS, color=ink, lw=0.8, ls=":")
        stall.set(title="A long prompt comes: do the others wait?", xlabel="time, s", ylabel="gap between tokens, ms")
        stall.set_xlim(0, 1.7)

        for mode, tokens in sizes.items():
            size.step([time for time, _ in tokens], [n for _, n in tokens], where="post", lw=1, color=colour(mode), label=mode)
        size.set(title="A backlog: how large are the steps?", xlabel="time, s", ylabel="tokens in a step", xlim=(0, 8))

        for place, mode in enumerate(latencies):
            at = [group + 0.27 * (place - 1) for group in range(3)]
            bars = wait.bar(at, latencies[mode], 0.25, color=colour(mode), label=mode)
            wait.bar_label(bars, fmt="%.2g", fontsize=8)
        wait.set(title="Short jobs behind long ones: how long?", ylabel="mean latency, s")
        wait.set_xticks(range(3), [f"up to {SHORT} tokens", "longer", "all"])

        useful, wasted = zip(*padding.values(), strict=True)
        waste.barh(list(padding), useful, color=[colour(mode) for mode in padding])
        bars = waste.barh(list(padding), wasted, left=useful, color=red, hatch="//", label="wasted")
        waste.bar_label(bars, labels=[f"{w / (u + w):.0%}" for u, w in padding.values()], padding=4)
        waste.set(
            title="Whole batches: what is padding?", xlabel="slots x steps", xlim=(0, 1.3 * max(map(sum, padding.values())))
        )
        waste.invert_yaxis()

        bars = shared.barh(list(prefills), list(prefills.values()), color=[colour(mode) for mode in prefills])
        bars[0].set_hatch("//")  # without a cache
        shared.bar_label(bars, fmt="{:,.0f}", padding=4)
        shared.axvline(needed, color=ink, lw=0.8, ls=":", label="what the prefixes leave to compute")
        shared.set(title="Shared prefixes: what is computed?", xlabel="prompt tokens", xlim=(0, 1.25 * max(prefills.values())))
        shared.invert_yaxis()
        for panel in (waste, shared):
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.locator_params(axis="x", nbins=4)

        parts = [[100 * share[part] for share in shares] for part in range(len(CENG523_VARIANTS) + 1)]
        names = (f"{CENG523_VARIANTS[0]}, the best", *CENG523_VARIANTS[1:], "late")
        tones = [style.tint(colour("deadline"), strength) for strength in (1.0, 0.65, 0.35)]
        variants.stackplot(RATES, parts, labels=names, colors=[*tones, red])
        for table in ceng523():
            most = capacity(KnownStepTime(table), deadline.LIMITS.max_batch_size, Shape(1, 1), deadline.DEADLINE_S)
            variants.axvline(most, color=ink, lw=0.8, ls=":")
        variants.set(title="deadline: who answers, as load grows?", xlabel="requests a second", ylabel="% of the requests")
        variants.set(xlim=(RATES[0], RATES[-1]), ylim=(0, 100))

        for panel in (stall, size, wait, waste, shared):
            panel.legend(fontsize=8)
        variants.legend(fontsize=8, loc="lower left", frameon=True)
        style.save(figure, path)

    drawn(path)


if __name__ == "__main__":
    main()
