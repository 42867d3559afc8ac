"""The CENG523 problem in virtual time: the project's tables, its worked example, and `deadline` beside the optimum.

    python -m teaching.examples.deadline

Prints what docs/ceng523.md explains. The objective was stated before anything was tuned: an answer within 100 ms of its arrival
earns its model's accuracy, one that is late or not given costs 1. The project names no accuracies; those here are 1 for LLM-1
and 0.95 and 0.85 for its distilled forms.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batching.policies.deadline import Deadline, DeadlineParams
from batching.policies.static import Static, StaticParams
from batching.policies.support.capacity import Shape, capacity
from batching.policy import Limits, Policy
from batching.request import Request
from benchmarks.program import show, text
from simulator.tables import CENG523_VARIANTS, KnownStepTime, StepTimeTable, Table, ceng523
from simulator.virtual import simulate
from teaching.examples.optimum import Optimum, Problem, solve

DEADLINE_S = 0.1
ACCURACIES = (1.0, 0.95, 0.85)
PRICE = 1.0
RATES = (50, 100, 150, 200, 250, 300, 350, 400)
REQUESTS = 20_000
LIMITS = Limits(max_batch_size=64, block_size=1, num_blocks=4096, max_queue=10**6, variants=CENG523_VARIANTS)
EXAMPLE_BATCH, EXAMPLE_RATE = 8, 100.0


def main() -> None:
    tables = ceng523()
    latency, throughput = formula(tables[0], EXAMPLE_BATCH, EXAMPLE_RATE)
    print(f"the formula, batches of {EXAMPLE_BATCH} at {EXAMPLE_RATE:g}/s: {1e3 * latency:.0f} ms, {throughput:.1f} requests/s")
    done = static_run(tables, EXAMPLE_BATCH, EXAMPLE_RATE)
    print(f"the same in virtual time: {describe(done)}")
    carried = [capacity(KnownStepTime(t), LIMITS.max_batch_size, Shape(1, 1), DEADLINE_S) for t in tables]
    print("capacities within 100 ms, requests/s: " + ", ".join(f"{c:.0f}" for c in carried))
    print(f"\nreward per request, {REQUESTS} requests, and how `deadline` served them")
    rows = [["rate", "optimum", "its run", "deadline", "share", *CENG523_VARIANTS, "late"]]
    for rate in RATES:
        solution = solve(Problem(rate, DEADLINE_S, tables, ACCURACIES, PRICE))
        best = outcome(run(Optimum(solution), tables, rate))
        ours = outcome(run(online(), tables, rate))
        shares = [f"{ours.served[v] / REQUESTS:.1%}" for v in range(len(tables))]
        rewards = [show(reward, 3) for reward in (solution.gain, best.reward, ours.reward)]
        rows.append([str(rate), *rewards, f"{ours.reward / solution.gain:.1%}", *shares, f"{ours.late / REQUESTS:.1%}"])
    print(text(rows, left=()))


def formula(table: Table, batch: int, rate: float) -> tuple[float, float]:
    """Latency and throughput as the project works them out: one batch collected, then served, then the next one collected."""
    latency = batch / rate + table.seconds(batch)
    return latency, batch / latency


def static_run(tables: Sequence[Table], batch: int, rate: float) -> list[Request]:
    """Batches of exactly so many on the first model, requests coming at equal gaps."""
    limits = Limits(max_batch_size=batch, block_size=1, max_queue=10**6)
    requests = [Request(str(i), [0], 1, arrival=i / rate) for i in range(1000 * batch)]
    return simulate(Static(StaticParams(batch_timeout_ms=60_000)), limits, requests, StepTimeTable(tables))


def describe(done: Sequence[Request]) -> str:
    latencies = [1e3 * (answered_at(req) - req.arrival) for req in done]
    seconds = answered_at(done[-1]) - done[0].arrival
    return f"{len(done) / seconds:.1f} requests/s, latency {min(latencies):.0f} to {max(latencies):.0f} ms"


def online() -> Policy:
    return Deadline(DeadlineParams(deadline_ms=1e3 * DEADLINE_S))


def run(policy: Policy, tables: Sequence[Table], rate: float, count: int = REQUESTS, seed: int = 1) -> list[Request]:
    """Poisson arrivals, the same ones for the same seed."""
    known = [KnownStepTime(table) for table in tables]
    return simulate(policy, LIMITS, poisson(rate, count, seed), StepTimeTable(tables), known=known)


def poisson(rate: float, count: int, seed: int) -> Iterator[Request]:
    rng, at = random.Random(seed), 0.0
    for i in range(count):
        at += rng.expovariate(rate)
        yield Request(str(i), [0], 1, arrival=at)


@dataclass(frozen=True)
class Outcome:
    reward: float  # per request
    served: Counter[int]  # in time, by variant
    late: int  # or rejected


def outcome(done: Sequence[Request]) -> Outcome:
    in_time = [req for req in done if req.error is None and answered_at(req) - req.arrival <= DEADLINE_S + 1e-9]
    served = Counter(req.variant for req in in_time)
    late = len(done) - len(in_time)
    earned = sum(ACCURACIES[variant] * count for variant, count in served.items())
    return Outcome((earned - PRICE * late) / len(done), served, late)


def answered_at(req: Request) -> float:
    assert req.answered_at is not None
    return req.answered_at


if __name__ == "__main__":
    main()
