"""Does static batching pay for its rectangle? Times whole static batches on the real engine and prints their ratios.

    python -m teaching.examples.static_pays --model gpt2-medium

Random weights; the repeats are taken in turn, after one that warms up. Seconds and ratios are medians, with how far the repeats
are apart; a ratio is that of runs of one repeat. 1.0 means that padding costs what real work costs. The last line of each table
is the contrast: what the batch would take if nothing were padded.
"""

import time

from batching.policies.dynamic import Dynamic
from batching.policies.static import Static, StaticParams
from batching.policy import Policy
from batching.scheduler import Scheduler
from benchmarks.program import add_model, add_repeat, arguments, text, with_spread
from benchmarks.workload import serve
from model.engine import Loaded, load_model, make_executor

Shape = tuple[int, int]  # prompt tokens, output tokens

CASES: dict[str, list[tuple[str, str, list[Shape]]]] = {
    "prompts (16 output tokens each)": [
        ("two of 512, static", "static", [(512, 16), (512, 16)]),
        ("16 and 512, static", "static", [(16, 16), (512, 16)]),
        ("16 and 512, dynamic", "dynamic", [(16, 16), (512, 16)]),
    ],
    "finished rows (prompts of 16, four rows)": [
        ("four of 48 output tokens, static", "static", [(16, 48)] * 4),
        ("three of 1 and one of 48, static", "static", [(16, 1)] * 3 + [(16, 48)]),
        ("three of 1 and one of 48, dynamic", "dynamic", [(16, 1)] * 3 + [(16, 48)]),
    ],
}


def main() -> None:
    parser = arguments(__doc__)
    add_model(parser, "gpt2-medium")
    add_repeat(parser, 5)
    args = parser.parse_args()
    loaded = load_model(args.model, "random", args.dtype, args.device, fall_back=False)
    print(f"{loaded.name}, random weights, {loaded.dtype} on {loaded.device}, {args.repeat} repeats")
    for title, cases in CASES.items():
        runs = [[seconds(loaded, mode, shapes) for _, mode, shapes in cases] for _ in range(args.repeat + 1)][1:]
        rows = [[title, "seconds", "ratio"]]
        for i, (name, _, _) in enumerate(cases):
            rows.append([name, with_spread([run[i] for run in runs], 3), with_spread([run[i] / run[0] for run in runs], 3)])
        print(f"\n{text(rows)}")


def seconds(loaded: Loaded, mode: str, shapes: list[Shape]) -> float:
    """Wall-clock time to serve one request of each shape, all there at the start."""
    executor, limits = make_executor(loaded, time.perf_counter, 4, 512, 64, 1.0)
    policy: Policy = Static(StaticParams(batch_timeout_ms=0)) if mode == "static" else Dynamic()
    jobs = [([1] * prompt, output) for prompt, output in shapes]
    return serve(Scheduler(policy, limits), executor, jobs, time.perf_counter)[1]


if __name__ == "__main__":
    main()
