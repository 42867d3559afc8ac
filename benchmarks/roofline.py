"""How close the engine comes to this machine's limits, and where the time of a step goes.

    python -m benchmarks.roofline --dtypes bf16,int8 --out results

First the limits: read bandwidth, and the matrix products of the model by batch. Then the engine's real decode step for every
batch and context: its time, its limit (the products, plus the KV cache read once at full bandwidth), and the share of
attention, products, sampling and scheduling. (A single token goes through a block in one kernel, which counts as products. On
a GPU, where a step is one graph, products and attention are those measured alone, and the step is compared with what its
bytes take at the bandwidth of a copy, or its arithmetic at the rate of a large matrix product.) And the workload W1, 64
requests at once, and W2, one at a time, each in turn with the products of the very same steps, which take as long and meet
the same neighbours. Random weights; the best of several interleaved rounds counts, for limits and engine alike. Prints
tables, writes roofline.csv and roofline.png.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from batching.driver import Driver
from batching.policies.dynamic import Dynamic
from batching.policies.nobatch import NoBatch
from batching.policy import Policy
from batching.request import Request
from batching.scheduler import Scheduler
from batching.step import Executor
from benchmarks import kernels
from benchmarks.limits import FreeExecutor, Products, read_bandwidth, step_sizes
from benchmarks.program import add_out, add_repeat, arguments, write_csv
from benchmarks.workload import Job, all_at_once, one_at_a_time, serve
from model import executor as executor_module
from model import gpt, linear
from model.checkpoint import CONFIGS
from model.device import free_memory, kv_dtype
from model.engine import Loaded, load_model, make_executor
from model.executor import GPTExecutor

BATCHES = (1, 4, 16, 64, 128, 256)
CONTEXTS = (16, 128, 256, 512, 1000)
STEPS = 8  # timed of each batch and context
MOST_KV_GB = 8.0
PARTS = ("products", "attention", "sampling", "scheduling", "rest")


@dataclass
class Point:
    """One batch at one context: seconds of the median step, its limit, and where the time went."""

    dtype: str
    batch: int
    context: int
    step_s: float
    limit_s: float
    ratio: float
    products: float
    attention: float
    sampling: float
    scheduling: float
    rest: float


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="gpt2-medium", choices=CONFIGS)
    parser.add_argument("--dtypes", default="fp32,bf16,int8")
    parser.add_argument("--device", default="auto")
    add_repeat(parser, 3)
    add_out(parser)
    args = parser.parse_args()
    points = []
    for dtype in args.dtypes.split(","):
        loaded = load_model(args.model, "random", dtype, args.device, fall_back=False)
        points += examine(loaded, args.repeat)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_csv(args.out / "roofline.csv", map(asdict, points))
        draw(points, args.out / "roofline.png")


def examine(loaded: Loaded, runs: int) -> list[Point]:
    """Measure one dtype and print its tables."""
    bandwidth = read_bandwidth(loaded.device)
    products = Products(loaded.model, loaded.dtype)
    kv_gb = min(MOST_KV_GB, free_memory(loaded.device) / 2**31)
    executor, limits = make_executor(loaded, time.perf_counter, max(BATCHES), 512, 1024, kv_gb)
    meter = Meter()
    served: dict[tuple[str, str], float] = {}  # seconds by workload, and by who: the engine or a kind of product
    timed: dict[tuple[int, int], list[dict[str, float]]] = {}
    for _ in range(runs):
        products.measure()
        bandwidth = max(bandwidth, read_bandwidth(loaded.device))
        for name, (policy, jobs) in WORKLOADS.items():
            _, took = serve(Scheduler(policy(), limits), executor, jobs, time.perf_counter)
            sizes = step_sizes(Scheduler(policy(), limits), jobs)
            seconds = {"engine": took} | {kind: products.replay(sizes, kind) for kind in products.kinds}
            served |= {(name, who): min(s, served.get((name, who), s)) for who, s in seconds.items()}
        for batch in BATCHES:
            for context in CONTEXTS:
                if batch * (-(-context // limits.block_size)) <= limits.num_blocks:
                    whole = replace(limits, token_budget=1 << 20, max_prefill_tokens=1 << 20)
                    with meter:
                        step = decode(Scheduler(Dynamic(), whole), executor, batch, context, meter)
                    if loaded.device.type == "cuda":
                        step = measured_alone(loaded, products, step, batch, context)
                    timed.setdefault((batch, context), []).append(step)
    column_bytes = 2 * loaded.model.config.n_layer * loaded.model.config.n_embd * kv_dtype(loaded.dtype, loaded.device).itemsize
    points = []
    for (batch, context), rounds in timed.items():
        parts = min(rounds, key=lambda parts: parts["step"])
        limit = products.seconds(batch, batch) + batch * context * column_bytes / bandwidth
        shares = {part: parts[part] / parts["step"] for part in PARTS}
        points.append(Point(loaded.dtype, batch, context, parts["step"], limit, limit / parts["step"], **shares))
    print_tables(loaded, bandwidth, products, points)
    if loaded.device.type == "cuda":
        print_bounds(loaded, points)
    for name, (_, jobs) in WORKLOADS.items():
        tokens = sum(count for _, count in jobs)
        rate, bounds = tokens / served[name, "engine"], {kind: tokens / served[name, kind] for kind in products.kinds}
        kinds = ", ".join(f"{kind} {bound:.1f}" for kind, bound in bounds.items())
        print(f"{name}: {rate:.1f} output tokens/s, {rate / max(bounds.values()):.0%} of its products alone ({kinds} tokens/s)")
    print(flush=True)
    return points


WORKLOADS: dict[str, tuple[type[Policy], list[Job]]] = {
    "W1, dynamic, 64 at once": (Dynamic, all_at_once()),
    "W2, nobatch, one at a time": (NoBatch, one_at_a_time()),
}


def decode(scheduler: Scheduler, executor: Executor, batch: int, context: int, meter: "Meter") -> dict[str, float]:
    """Seconds of the median decode step over `batch` rows that reach `context` columns, and of its parts. What leads up to it
    is answered without computing: the time of a step does not depend on what the cache holds."""
    driver = Driver(scheduler, time.perf_counter, lambda req: None)
    for i in range(batch):
        driver.submit(Request(str(i), [1] * (context - STEPS), STEPS + 2))
    free = FreeExecutor()
    driver.iterate(free)
    steps = []
    for _ in range(STEPS):
        meter.seconds.clear()
        started, computed = time.perf_counter(), meter.computed
        driver.iterate(executor)
        whole = time.perf_counter() - started
        parts = {part: meter.seconds.get(part, 0.0) for part in PARTS}
        parts["scheduling"] = whole - (meter.computed - computed)
        parts["rest"] = whole - sum(parts.values())
        steps.append({"step": whole, **parts})
    while driver.iterate(executor) is not None:
        pass
    return sorted(steps, key=lambda parts: parts["step"])[STEPS // 2]


def measured_alone(loaded: Loaded, products: Products, step: dict[str, float], batch: int, context: int) -> dict[str, float]:
    """The parts of a step on a GPU, whose host sees only that the whole is launched."""
    inputs = kernels.Inputs(batch, context, kv_dtype(loaded.dtype, loaded.device), loaded.device)
    with torch.inference_mode():
        attention = kernels.time_of(kernels.ours(inputs), loaded.device) * loaded.model.config.n_layer
    parts = {"products": products.seconds(batch, batch), "attention": attention, "sampling": 0.0, "scheduling": 0.0}
    return {"step": step["step"], **parts, "rest": step["step"] - sum(parts.values())}


def print_bounds(loaded: Loaded, points: list[Point]) -> None:
    """Each step against the two times that no GPU code undercuts."""
    copy, rate = kernels.copy_bandwidth(loaded.device), matmul_rate(loaded)
    config, size = loaded.model.config, kv_dtype(loaded.dtype, loaded.device).itemsize
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    print(f"copies {copy / 1e9:.0f} GB/s, multiplies {rate / 1e12:.0f} TFLOP/s; step / max(bytes / copy, FLOP / rate):")
    for p in points:
        columns = 2 * config.n_layer * config.n_embd * p.batch * p.context
        bound = max((weights + columns) * size / copy, 2 * (weights * p.batch + columns) / rate)
        print(f"  batch {p.batch:3}, context {p.context:4}: {p.step_s / bound:.2f}  ({1e3 * bound:.3f} ms)")


def matmul_rate(loaded: Loaded, size: int = 8192) -> float:
    """Floating-point operations a second in a large product of random numbers."""
    a, b = (torch.randn(size, size, device=loaded.device).to(kv_dtype(loaded.dtype, loaded.device)) for _ in range(2))
    return 2 * size**3 / kernels.median(lambda: a @ b, loaded.device)


class Meter:
    """Adds up the wall-clock time inside the model's parts while it is entered."""

    PLACES: tuple[tuple[Any, str, str], ...] = (
        (linear.PackedLinear, "forward", "products"),
        (linear.Int8Linear, "forward", "products"),
        (linear.one_token, "block", "products"),  # and what else is in a block
        (torch.nn.Linear, "forward", "products"),
        (gpt, "paged_attention", "attention"),
        (executor_module, "sample", "sampling"),
        (GPTExecutor, "submit", "computed"),
        (GPTExecutor, "collect", "computed"),
    )

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.computed = 0.0

    def __enter__(self) -> None:
        self._originals = [getattr(owner, name) for owner, name, _ in self.PLACES]
        for (owner, name, part), function in zip(self.PLACES, self._originals, strict=True):
            setattr(owner, name, self._timed(function, part))

    def __exit__(self, *failure: object) -> None:
        for (owner, name, _), function in zip(self.PLACES, self._originals, strict=True):
            setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds = time.perf_counter() - started
                if part == "computed":
                    self.computed += seconds
                else:
                    self.seconds[part] = self.seconds.get(part, 0.0) + seconds

        return timed


def print_tables(loaded: Loaded, bandwidth: float, products: Products, points: list[Point]) -> None:
    threads = torch.get_num_threads()
    print(
        f"{loaded.name}, random weights, {loaded.dtype} on {loaded.device}, {threads} threads; reads {bandwidth / 1e9:.1f} GB/s"
    )
    print(f"\n{'matrix products alone, tokens/s by batch':42}" + "".join(f"{n:8}" for n in products.layers["library"]))
    for kind in products.kinds:
        print(f"  {kind:40}" + "".join(f"{n / products.seconds(n, n, kind):8.0f}" for n in products.layers[kind]))
    print(f"\n{'batch':>5} {'context':>7} {'step ms':>9} {'limit ms':>9} {'ratio':>6} {'tokens/s':>9}", end="")
    print("".join(f"{part:>11}" for part in PARTS))
    for p in points:
        line = (
            f"{p.batch:5} {p.context:7} {1e3 * p.step_s:9.2f} {1e3 * p.limit_s:9.2f} {p.ratio:6.0%} {p.batch / p.step_s:9.1f}"
        )
        print(line + "".join(f"{getattr(p, part):11.1%}" for part in PARTS))
    print()


def draw(points: list[Point], path: Path) -> None:
    """Tokens a second against the limit, one panel a dtype, and below it where a step of 64 rows spends its time."""
    from client.shared import style

    dtypes = list(dict.fromkeys(p.dtype for p in points))
    caption = (
        "Above: decode steps by batch and context (solid) and their limit, the matrix products and one reading of the KV cache "
        "(dotted): the gap is what the engine could still win. Below: where a step of 64 rows spends its time, and its limit."
    )

    @style.in_both_themes
    def drawn(path: Path) -> None:
        figure = style.figure(max(7.0, 4.6 * len(dtypes)), 8, "How close is a decode step to the machine's limit?", caption)
        axes = figure.subplots(2, len(dtypes), sharey="row", squeeze=False)
        for dtype, (rates, shares) in zip(dtypes, axes.T, strict=True):
            for context, tone in zip(CONTEXTS, style.shades(len(CONTEXTS)), strict=True):
                own = [p for p in points if (p.dtype, p.context) == (dtype, context)]
                batches = [p.batch for p in own]
                rates.plot(batches, [p.batch / p.step_s for p in own], "o-", color=tone, label=f"context {context}")
                rates.plot(batches, [p.batch / p.limit_s for p in own], ":", color=tone)
            rates.set(title=dtype, xscale="log", yscale="log", xlabel="batch", xticks=BATCHES, xticklabels=BATCHES)
            rates.minorticks_off()
            rates.grid(True)
            own = [p for p in points if p.dtype == dtype and p.batch == 64]
            places, bottom = range(len(own)), [0.0] * len(own)
            for part, tone in zip(PARTS, style.shades(len(PARTS)), strict=True):
                values = [1e3 * p.step_s * getattr(p, part) for p in own]
                shares.bar(places, values, bottom=bottom, color=tone, label=part)
                bottom = [low + value for low, value in zip(bottom, values, strict=True)]
            shares.plot(
                places, [1e3 * p.limit_s for p in own], "_", color=style.theme().waste, markersize=36, mew=2, label="limit"
            )
            shares.set(xticks=list(places), xticklabels=[p.context for p in own], xlabel="context (64 rows)")
        axes[0][0].set_ylabel("tokens a second (dotted: the limit)")
        axes[1][0].set_ylabel("milliseconds a decode step")
        axes[0][0].legend()
        axes[1][0].legend()
        style.save(figure, path)

    drawn(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
