"""How fast the simulator is, and how much memory a long run takes: `dynamic` on one core, its engine nine tenths busy.

    python -m benchmarks.simulator --requests 1000000 --output 8
    python -m benchmarks.simulator --requests 100000 --output 72

The engine has 256 slots and a made-up law of step times. `results` are the figures that are kept of each request and token; all
else is what the simulator itself takes.
"""

import resource
import time

from batching.policies.dynamic import Dynamic
from batching.policy import Limits
from benchmarks.program import arguments
from simulator.plans import Lengths, poisson_plan
from simulator.results import Results
from simulator.step_times import Linear
from simulator.virtual import OpenLoop, Replica, serve

LOAD = 0.9
PROMPT = 32
LIMITS = Limits(max_batch_size=256, token_budget=512, num_blocks=16384, max_queue=100_000)
LAW = Linear((5e-3, 2e-5, 5e-5, 1e-8, 1e-9))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--output", type=int, default=8, help="tokens of each")
    args = parser.parse_args()
    rate = LOAD * capacity(args.output)
    before = peak_mib()
    begun = time.perf_counter()
    took, replica, results = serve_at(rate, args.requests, args.output)
    by_the_clock = time.perf_counter() - begun
    peak = peak_mib()
    counts = replica.driver.stats.totals().counts
    columns = results.columns()
    served, virtual_s = len(columns.output), float(columns.answered.max())
    kept = sum(column.nbytes for column in vars(columns).values()) / 2**20
    print(f"{served} requests of {PROMPT} + {args.output} tokens, {rate:.0f} a second: {virtual_s:.0f} s in virtual time")
    rows = sum(size * times for size, times in counts.batch_sizes.items())
    print(f"{took:.1f} s of one core ({by_the_clock:.1f} s by the clock), {served / took:.0f} requests/s", end=", ")
    print(f"{1e6 * took / rows:.1f} us a row of a step; {counts.steps} steps of {rows / counts.steps:.0f} rows")
    print(f"peak memory {peak:.0f} MiB, before the run {before:.0f} MiB; results {kept:.0f} MiB")


def capacity(output: int) -> float:
    """Requests a second that the engine can do: what it does when all are there at once."""
    _, replica, results = serve_at(float("inf"), 2000, output)
    return len(results.columns().output) / replica.clock.now


def serve_at(rate: float, requests: int, output: int) -> tuple[float, Replica, Results]:
    """Seconds of a processor core, the engine, and what came of the requests."""
    results = Results()
    plan = poisson_plan(requests, rate, Lengths(PROMPT, PROMPT), Lengths(output, output))
    replica = Replica(Dynamic(), LIMITS, LAW, results.add)
    begun = time.process_time()
    serve([replica], OpenLoop(plan.draw()))
    return time.process_time() - begun, replica, results


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
