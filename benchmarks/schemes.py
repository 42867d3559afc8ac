"""What each scheme is for, in one picture: a workload that shows it, the scheme, and those that it improves upon.

    python -m benchmarks.schemes --plot schemes.png

In virtual time, by the policy files of the server: nothing depends on the machine. A step takes 5 ms, 0.3 ms a prompt token,
0.8 ms a decode, and what attention takes: a law of the size of a GPT's, made up for this table. `deadline` runs on the tables
of the CENG523 project, and prefixes are those of `benchmarks/prefix.py`. `mixed` has its own: `benchmarks/mixed.py`.
"""

import argparse
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from batching.policies import POLICIES
from batching.policies.support.capacity import Shape, capacity
from batching.policy import Limits
from batching.request import Request
from batching.step import Step
from batching.step_time import Load, StepTime
from benchmarks import deadline, prefix
from simulator.step_times import Linear
from simulator.tables import CENG523_VARIANTS, KnownStepTime, ceng523
from simulator.virtual import simulate

LAW = Linear((0.005, 3e-4, 8e-4, 1e-6, 1e-7))
SLO_MS = 50.0
TALKERS, LONG_PROMPT, COMES_AT = 8, 1000, 0.5
SHORT = 16  # tokens: what counts as a short job
RATES = range(50, 401, 25)
REQUESTS = 5000  # at each of them
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
Gaps = list[tuple[float, float]]  # when a token came, and how long after the one before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="write the picture here (needs requirements-bench.txt)")
    args = parser.parse_args()
    stalls = {
        "orca": gaps("orca"),
        "sarathi": gaps("sarathi", {"tbt_slo_ms": SLO_MS}),
        "flover, two lanes": gaps("flover", lanes=2),
    }
    sizes = {mode: step_sizes(mode) for mode in ("orca", "splitfuse")}
    latencies = {mode: mean_latencies(mode) for mode in ("orca", "dynamic", "fastserve")}
    padding = {
        "static": slot_steps("static", {}),
        "sequence, lengths\noff by 30%": slot_steps("sequence", {"predictor": "noisy", "error": 0.3}),
        "sequence, lengths\nknown": slot_steps("sequence", {}),
    }
    prefills, needed = prefill_tokens()
    shares = [variant_shares(rate) for rate in RATES]

    print(f"the longest gap between tokens of {TALKERS} requests when a prompt of {LONG_PROMPT} tokens comes")
    for mode, found in stalls.items():
        print(f"  {mode:20} {1e3 * max(gap for _, gap in found):6.0f} ms")
    print("tokens in a step while there is a backlog, budget 256: p5, p50, p95")
    for mode, counts in sizes.items():
        print(f"  {mode:20} {' '.join(f'{n:6.0f}' for n in quantiles([tokens for _, tokens in counts], n=20)[::9])}")
    print(f"mean latency of jobs of up to {SHORT} tokens, of longer ones, of all (s)")
    for mode, means in latencies.items():
        print(f"  {mode:20} " + " ".join(f"{value:6.2f}" for value in means))
    print("slot-steps with a token, without")
    for mode, (useful, wasted) in padding.items():
        print(f"  {' '.join(mode.split()):30} {useful:7} {wasted:7}")
    print(f"prompt tokens computed with memory for seven requests; {needed} would do")
    for mode, tokens in prefills.items():
        print(f"  {' '.join(mode.split()):20} {tokens:7}")
    print(f"requests answered in time by each variant, and late, of {REQUESTS} at each rate")
    for rate, share in zip(RATES, shares, strict=True):
        print(f"  {rate:4}/s " + " ".join(f"{100 * part:5.1f}%" for part in share))
    if args.plot:
        draw(args.plot, stalls, sizes, latencies, padding, prefills, needed, shares)
        print(f"wrote {args.plot}")


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


def step_sizes(mode: str) -> list[tuple[float, int]]:
    """When each step was planned, and its tokens, while somebody's prompt is not done: more come than can be served."""
    rng, at, requests = random.Random(3), 0.0, []
    for i in range(150):
        at += rng.expovariate(20.0)
        requests.append(Request(f"{i}", [0] * rng.randint(10, 400), rng.randint(1, 60), arrival=at))
    limits = Limits(max_batch_size=128, token_budget=256, max_context=1024, num_blocks=100_000)
    steps = serve(mode, {}, limits, requests)
    last = max(i for i, step in enumerate(steps) if any(row.start == 0 for row in step.rows))
    return [(step.planned_at, step.num_tokens) for step in steps[:last]]


def mean_latencies(mode: str) -> tuple[float, float, float]:
    """Of short jobs, long ones, and all: seven of ten generate 4 to 16 tokens, one in ten more than 70 (Pareto, shape 0.8)."""
    rng, at, requests = random.Random(1), 0.0, []
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


def slot_steps(mode: str, params: dict[str, Any]) -> tuple[int, int]:
    """With a token of somebody, and without: 256 requests, half of 1 to 40 tokens, half of 100 to 400."""
    rng = random.Random(7)
    lengths = [rng.choice((rng.randint(1, 40), rng.randint(100, 400))) for _ in range(256)]
    requests = [Request(str(i), [0] * 5, length) for i, length in enumerate(lengths)]
    limits = Limits(max_batch_size=64, num_blocks=100_000)
    rows = [row for step in serve(mode, {"batch_timeout_ms": 0} | params, limits, requests) for row in step.rows]
    useful = sum(row.count > 0 for row in rows)
    return useful, len(rows) - useful


def prefill_tokens() -> tuple[dict[str, int], int]:
    """Those computed by `benchmarks/prefix.py` with little memory; and how many the prefixes leave to be computed."""
    names = {("dynamic", False): "dynamic,\nno cache", ("dynamic", True): "dynamic", ("batchllm", True): "batchllm"}
    families, members, shared, own = 24, 12, 256, 40
    found = {
        name: prefix.run(mode, caching, 160, prefix.offline_batch(families, members, shared, own))[0]
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    (stall, size, wait), (waste, shared, variants) = figure.subplots(2, 3)

    for (mode, found), colour in zip(stalls.items(), COLOURS, strict=False):
        stall.step([time for time, _ in found], [1e3 * gap for _, gap in found], lw=1.5, color=colour, label=mode)
    stall.axhline(SLO_MS, color="k", lw=0.8, ls=":")
    stall.set(
        title="A long prompt comes: do the others wait?", xlabel="time, s", ylabel="gap between tokens, ms", xlim=(0, 1.7)
    )

    for (mode, tokens), colour in zip(sizes.items(), COLOURS, strict=False):
        size.step([time for time, _ in tokens], [n for _, n in tokens], where="post", lw=1, color=colour, label=mode)
    size.set(title="A backlog: how large are the steps?", xlabel="time, s", ylabel="tokens in a step", xlim=(0, 8))

    for place, (mode, colour) in enumerate(zip(latencies, COLOURS, strict=False)):
        at = [group + 0.27 * (place - 1) for group in range(3)]
        bars = wait.bar(at, latencies[mode], 0.25, color=colour, label=mode)
        wait.bar_label(bars, fmt="%.2g", fontsize=8)
    wait.set(title="Short jobs behind long ones: how long?", ylabel="mean latency, s")
    wait.set_xticks(range(3), [f"up to {SHORT} tokens", "longer", "all"])

    useful, wasted = zip(*padding.values(), strict=True)
    waste.barh(list(padding), useful, color=COLOURS[0], label="computes somebody's token")
    bars = waste.barh(list(padding), wasted, left=useful, color=COLOURS[1], label="wasted")
    waste.bar_label(bars, labels=[f"{w / (u + w):.0%}" for u, w in padding.values()], padding=4)
    waste.set(title="Whole batches: what is padding?", xlabel="slots x steps", xlim=(0, 1.3 * max(map(sum, padding.values()))))
    waste.invert_yaxis()
    waste.xaxis.set_major_formatter("{x:,.0f}")
    waste.locator_params(axis="x", nbins=4)

    bars = shared.barh(list(prefills), list(prefills.values()), color=[COLOURS[0], COLOURS[0], COLOURS[2]])
    shared.bar_label(bars, fmt="{:,.0f}", padding=4)
    shared.axvline(needed, color="k", lw=0.8, ls=":", label="what the prefixes leave to compute")
    shared.set(title="Shared prefixes: what is computed?", xlabel="prompt tokens")
    shared.set_xlim(0, 1.25 * max(prefills.values()))
    shared.invert_yaxis()
    shared.xaxis.set_major_formatter("{x:,.0f}")
    shared.locator_params(axis="x", nbins=4)

    parts = [[100 * share[part] for share in shares] for part in range(len(CENG523_VARIANTS) + 1)]
    names = (f"{CENG523_VARIANTS[0]}, the best", *CENG523_VARIANTS[1:], "late")
    variants.stackplot(RATES, parts, labels=names, colors=[COLOURS[0], COLOURS[5], COLOURS[2], COLOURS[1]])
    for table in ceng523():
        variants.axvline(
            capacity(KnownStepTime(table), deadline.LIMITS.max_batch_size, Shape(1, 1), deadline.DEADLINE_S),
            color="k", lw=0.8, ls=":",
        )  # fmt: skip
    variants.set(title="deadline: who answers, as load grows?", xlabel="requests a second", ylabel="% of the requests")
    variants.set(xlim=(RATES[0], RATES[-1]), ylim=(0, 100))

    for panel in (stall, size, wait, waste, shared):
        panel.legend(fontsize=8)
    variants.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
