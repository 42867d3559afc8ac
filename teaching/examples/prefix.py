"""What prefix caching and `batchllm` save, in virtual time: the same offline batch under each policy, with memory for all of it
and with memory for a few prefixes.

    python -m teaching.examples.prefix

Families of prompts with a common beginning, all there at the start, in turn one of each family: the worst order for a cache
that evicts what was used least recently. Saving = 1 - processed / logical prefill tokens. A step takes 5 ms, 0.3 ms a prompt
token and 0.8 ms a decode: a law made up for this table, on which no saving depends. Medians of so many repeats, each with other
lengths of outputs, and how far these are apart.
"""

import random

from batching.policies import POLICIES
from batching.policy import Limits
from batching.request import Priority, Request
from batching.step import Step
from batching.step_time import Load
from benchmarks.program import add_repeat, arguments, middle, text, with_spread
from simulator.virtual import simulate

BLOCK = 16
CASES = (("dynamic", False), ("dynamic", True), ("mixed", True), ("batchllm", True))  # mode, prefix caching


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--families", type=int, default=24)
    parser.add_argument("--members", type=int, default=12, help="requests in a family")
    parser.add_argument("--prefix", type=int, default=256, help="tokens in common; rounded down to full blocks")
    parser.add_argument("--own", type=int, default=40, help="tokens of its own that each prompt has")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8192, 160], help="KV blocks of 16 tokens")
    add_repeat(parser, 3)
    args = parser.parse_args()
    shape = args.families, args.members, args.prefix // BLOCK * BLOCK, args.own
    logical = sum(len(req.tokens) for req in offline_batch(*shape))
    most = args.families * (args.members - 1) * shape[2] / logical
    print(f"{args.families * args.members} requests, {logical} prompt tokens; their prefixes allow to save {most:.1%}")
    rows = [["policy", "cache", "KV blocks", "prefill tokens", "saving", "preempted", "steps", "seconds"]]
    for blocks in args.blocks:
        for mode, caching in CASES:
            runs = [run(mode, caching, blocks, offline_batch(*shape, seed)) for seed in range(args.repeat)]
            processed, preempted, steps, seconds = (list(figures) for figures in zip(*runs, strict=True))
            saving = f"{1 - middle(processed) / logical:.1%}"
            counts = [with_spread(processed, 0), saving, with_spread(preempted, 0), with_spread(steps, 0)]
            rows.append([mode, "on" if caching else "off", str(blocks), *counts, with_spread(seconds, 1)])
    print(text(rows, left=(0, 1)))


def offline_batch(families: int, members: int, prefix: int, own: int, seed: int = 0) -> list[Request]:
    """Deferred requests with outputs of 8 to 64 tokens, which `seed` draws."""
    rng = random.Random(seed)
    return [
        Request(f"{family}-{i}", [family] * prefix + [families + i] * own, rng.randint(8, 64), Priority.DEFERRED, due=1e6)
        for i in range(members)
        for family in range(families)
    ]


def run(mode: str, caching: bool, blocks: int, requests: list[Request]) -> tuple[int, int, int, float]:
    """Prompt tokens computed, preemptions, steps, and the virtual seconds until all are answered."""
    steps: list[Step] = []
    preemptions: list[int] = []
    limits = Limits(block_size=BLOCK, num_blocks=blocks, prefix_caching=caching)
    answered = simulate(
        POLICIES[mode](), limits, requests, step_time,
        on_step=steps.append, on_plan=lambda plan: preemptions.append(len(plan.preempted)),
    )  # fmt: skip
    rows = [row for step in steps for row in step.rows]
    processed = sum(max(0, min(row.start + row.count, row.req.prompt_len) - row.start) for row in rows)
    return processed, sum(preemptions), len(steps), max(req.answered_at or 0.0 for req in answered)


def step_time(step: Step) -> float:
    load = Load.of((row.count, row.start) for row in step.rows)
    return 0.005 + 3e-4 * load.prefill + 8e-4 * load.decodes


if __name__ == "__main__":
    main()
