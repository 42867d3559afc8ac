"""Does deferred work hurt the requests that somebody waits for? Immediate requests at 30% of the engine's capacity: alone,
beside a full backlog of deferred ones under `mixed`, and beside the same backlog first come, first served (`dynamic`). Then a
batch with a window of which it needs 80%.

    python -m benchmarks.mixed --model gpt2 --slo-ms 120

Random weights on the real engine; Poisson arrivals, the same ones in every run; prompts and outputs of uniform length. As on
the server, the backlog is fed so that one batch of it runs while another waits. Prints a table; writes mixed.csv and mixed.png.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policies.mixed import Mixed, MixedParams
from batching.policy import Limits, Policy
from batching.request import Priority, Request, RequestError
from batching.scheduler import Scheduler
from batching.stats import distribution
from batching.step import Executor
from batching.step_time import Load, Probe, StepTime
from benchmarks.program import add_model, arguments, write_csv
from jobs.runner import due_share
from model.engine import load_model, make_executor
from model.probe import probe

TOKEN_IDS = 2500  # every vocabulary has these
PROMPTS, OUTPUTS = (16, 256), (16, 128)  # tokens
SLOTS, TOKEN_BUDGET, KV_GB = 64, 512, 4.0
LOAD = 0.3  # of the capacity
NEEDS = 0.8  # of its window, by the batch
WINDOW_S = 180.0
CAPACITY_S = 60.0
TIMES = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "longest")
COLUMNS = [("run", 18, ""), ("seconds", 7, ".1f"), ("in+out/s", 8, ".0f"), ("deferred", 8, ""), ("over", 6, ".2%")] + [
    (name, 8, ".3f") for name in TIMES
]


@dataclass
class Run:
    """What came of one, until its last immediate request was answered (or, with none, its last deferred one)."""

    name: str
    begun: float
    seconds: float
    tokens_per_s: float  # computed, prompts included, nothing counted twice
    answered: list[Request]

    def of(self, priority: Priority) -> list[Request]:
        return [req for req in self.answered if req.priority is priority]

    @property
    def ttft(self) -> list[float]:
        return [req.server_ttft for req in self.of(Priority.IMMEDIATE)]

    @property
    def itl(self) -> list[float]:
        return [gap for req in self.of(Priority.IMMEDIATE) for gap in req.itl]

    def row(self, slo_s: float) -> dict[str, Any]:
        """By COLUMNS. `over`: the share of times between tokens over the limit."""
        ttft, itl = distribution(self.ttft or [0.0]), distribution(self.itl or [0.0])
        times = ttft["p50"], ttft["p99"], itl["p50"], itl["p99"], max(self.itl, default=0.0)
        over = sum(gap > slo_s for gap in self.itl) / max(1, len(self.itl))
        values = self.name, self.seconds, self.tokens_per_s, len(self.of(Priority.DEFERRED)), over, *times
        return dict(zip([name for name, _, _ in COLUMNS], values, strict=True))


def main() -> None:
    parser = arguments(__doc__)
    add_model(parser, "gpt2")
    parser.add_argument("--requests", type=int, default=1000, help="immediate ones")
    parser.add_argument("--slo-ms", type=float, required=True, help="time between tokens to keep")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR")
    args = parser.parse_args()
    loaded = load_model(args.model, "random", args.dtype, args.device, fall_back=False)
    executor, limits = make_executor(loaded, time.perf_counter, SLOTS, TOKEN_BUDGET, 10**6, KV_GB)
    limits, probes = probe(executor, limits)
    print(
        f"{loaded.name}, random weights, {loaded.dtype} on {loaded.device}; time between tokens: {args.slo_ms:g} ms", flush=True
    )
    bench = Bench(executor, limits, probes, args.slo_ms / 1e3)
    print("  ".join(f"{name:>{width}}" for name, width, _ in COLUMNS))
    runs = list(bench.runs(args.requests))
    print_ratios(runs, args.slo_ms / 1e3)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "mixed.csv", (run.row(args.slo_ms / 1e3) for run in runs))
    draw(runs, args.slo_ms / 1e3, args.out / "mixed.png")


class Bench:
    def __init__(self, executor: Executor, limits: Limits, probes: Sequence[Probe], slo_s: float) -> None:
        self._executor = executor
        self._limits = limits
        self._probes = probes
        self._slo_s = slo_s

    def runs(self, num_requests: int) -> Iterator[Run]:
        slots = self._largest_batch()
        print(f"a decode step of {slots} requests keeps the limit of {1e3 * self._slo_s:g} ms", flush=True)
        yield self._run("largest batch", Dynamic(), [], backlog(), CAPACITY_S, slots)
        whole = self._run("deferred, dynamic", Dynamic(), [], backlog(), CAPACITY_S)
        yield whole
        yield self._run("deferred, mixed", self._mixed(), [], backlog(), CAPACITY_S)
        rate = LOAD * whole.tokens_per_s / ((sum(PROMPTS) + sum(OUTPUTS)) / 2)
        print(f"{num_requests} immediate requests, {rate:.2f} a second", flush=True)
        yield self._run("immediate, mixed", self._mixed(), immediate(num_requests, rate), iter(()))
        both = self._run("both, mixed", self._mixed(), immediate(num_requests, rate), backlog(), 0.0)
        yield both
        yield self._run("largest batch", Dynamic(), [], backlog(), CAPACITY_S, slots)
        yield self._run("both, dynamic", Dynamic(), immediate(num_requests, rate), backlog(), 0.0)
        size = int(NEEDS * WINDOW_S * len(both.of(Priority.DEFERRED)) / both.seconds)
        beside = immediate(int(rate * WINDOW_S), rate)
        yield self._run("window, mixed", self._mixed(), beside, backlog(size, WINDOW_S))

    def _mixed(self) -> Policy:
        return Mixed(MixedParams(tbt_slo_ms=1e3 * self._slo_s))

    def _largest_batch(self) -> int:
        """The most requests, in the middle of their outputs, whose decode step keeps the limit."""
        model = StepTime()
        for measured in self._probes:
            model.observe(measured.load, measured.seconds)
        middle = sum(PROMPTS) // 2 + sum(OUTPUTS) // 4
        sizes = (size for size in range(SLOTS, 0, -1) if model.predict(Load(0, size, size * middle, 0)) <= self._slo_s)
        return next(sizes, 1)

    def _run(
        self,
        name: str,
        policy: Policy,
        coming: Sequence[Request],
        deferred: Iterator[Request],
        at_least_s: float | None = None,
        slots: int = SLOTS,
    ) -> Run:
        """Serve `coming` at their arrivals, and beside them as many of `deferred` as a batch that runs and one that waits. Ends
        with the last of `coming`, but not before `at_least_s`; where that is None, with the last of both."""
        answered: list[Request] = []
        driver = Driver(Scheduler(policy, replace(self._limits, max_batch_size=slots)), time.perf_counter, answered.append)
        for measured in self._probes:
            driver.learn(measured)
        begun = time.perf_counter()
        queue = sorted(coming, key=lambda req: -req.arrival)
        fed: list[Request] = []
        more = True
        while True:
            now = time.perf_counter() - begun
            while queue and queue[-1].arrival <= now:
                driver.submit(_at(queue.pop(), begun))
            done = sum(req.answered_at is not None for req in coming)
            while more and len(fed) - (len(answered) - done) < 2 * slots:
                if more := (req := next(deferred, None)) is not None:
                    req.arrival = now
                    fed.append(_at(req, begun))
                    driver.submit(req)
            over = len(answered) == len(coming) + len(fed) if at_least_s is None else now >= at_least_s
            if done == len(coming) and over:
                break
            if driver.iterate(self._executor) is None:
                time.sleep(max(0.0, queue[-1].arrival - (time.perf_counter() - begun)))
        return self._ended(name, driver, begun, answered, fed)

    def _ended(self, name: str, driver: Driver, begun: float, answered: list[Request], fed: list[Request]) -> Run:
        ended = time.perf_counter()
        totals = driver.stats.summary(ended, live=True)
        tokens = totals["tokens_computed"] - totals["recomputed_tokens"]
        run = Run(name, begun, ended - begun, tokens / (ended - begun), list(answered))
        for req in fed:
            driver.cancel(req.id, RequestError("cancelled", "the run is over"))
        while driver.iterate(self._executor) is not None:
            pass  # what is under way
        row = run.row(self._slo_s)
        print("  ".join(f"{row[name]:>{width}{form}}" for name, width, form in COLUMNS), flush=True)
        return run


def immediate(num: int, rate: float) -> list[Request]:
    """Poisson arrivals, in seconds from the start of a run."""
    rng = random.Random(1)
    gaps = (rng.expovariate(rate) for _ in range(num))
    return [_request(f"now-{i}", rng, Priority.IMMEDIATE, at) for i, at in enumerate(accumulate(gaps))]


def backlog(num: int | None = None, window_s: float | None = None) -> Iterator[Request]:
    """`num` deferred requests, or as many as are asked for. With a window they are due in stages, as the server has it."""
    rng = random.Random(2)
    for i in count() if num is None else range(num):
        req = _request(f"later-{i}", rng, Priority.DEFERRED, 0.0)
        if num and window_s:
            req.due = due_share((i + 1) / num) * window_s
        yield req


def _request(name: str, rng: random.Random, priority: Priority, arrival: float) -> Request:
    prompt = [rng.randrange(TOKEN_IDS) for _ in range(rng.randint(*PROMPTS))]
    return Request(name, prompt, rng.randint(*OUTPUTS), priority, arrival)


def _at(req: Request, begun: float) -> Request:
    req.arrival += begun
    req.due = None if req.due is None else req.due + begun
    return req


def print_ratios(runs: Sequence[Run], slo_s: float) -> None:
    """Those that the policy is held to."""
    before, whole, mixed, alone, both, after, fcfs, window = runs
    best = (before.tokens_per_s + after.tokens_per_s) / 2  # a shared machine's speed changes within minutes
    itl, ttft, late = (distribution(values)["p99"] or 0.0 for values in (both.itl, both.ttft, fcfs.ttft))
    done = max(req.answered_at or 0.0 for req in window.of(Priority.DEFERRED)) - window.begun
    print(f"""
p99 time between tokens / limit          {itl / slo_s:6.2f}   at most 1.1
p99 TTFT / without the backlog           {ttft / (distribution(alone.ttft)["p99"] or 1):6.2f}   at most 1.5
in+out/s / largest batch in the limit    {both.tokens_per_s / best:6.2f}   at least 0.85
last of the batch / window               {done / WINDOW_S:6.2f}   at most 1
p99 TTFT, dynamic / mixed                {late / ttft:6.1f}   at least 5
deferred only, mixed / dynamic           {mixed.tokens_per_s / whole.tokens_per_s:6.2f}   0.95 to 1.05""")


def draw(runs: Sequence[Run], slo_s: float, path: Path) -> None:
    """How long the immediate requests waited for their first token and between tokens, by run."""
    from client.shared import style

    shown = {
        "immediate, mixed": ("alone", "mixed", ":"),
        "both, mixed": ("beside deferred work, mixed", "mixed", "-"),
        "both, dynamic": ("the same, dynamic (FCFS)", "dynamic", "-"),
    }
    caption = (
        "Immediate requests alone, beside a backlog of deferred ones under mixed, and beside the same backlog first come, "
        "first served. Further left is better: with mixed both curves stay close to each other and left of the limit."
    )

    @style.in_both_themes
    def drawn(path: Path) -> None:
        figure = style.figure(10, 4.4, "Does deferred work hurt those who wait?", caption)
        first, between = figure.subplots(1, 2, sharey=True)
        for run in runs:
            if run.name in shown:
                label, mode, line = shown[run.name]
                for axis, values in ((first, run.ttft), (between, run.itl)):
                    shares = [(i + 1) / len(values) for i in range(len(values))]
                    axis.plot(sorted(values), shares, line, color=style.colour(mode), linewidth=2, label=label)
        between.axvline(slo_s, color=style.theme().ink, linestyle="--", linewidth=1, label="limit")
        first.set(xscale="log", xlabel="seconds to the first token", ylabel="share of immediate requests or tokens")
        between.set(xscale="log", xlabel="seconds between tokens")
        for axis in (first, between):
            axis.grid(True)
        first.legend(*between.get_legend_handles_labels(), loc="center", bbox_to_anchor=(0.68, 0.3))
        style.save(figure, path)

    drawn(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
