"""Does another device or dtype choose the tokens that float32 on a CPU chooses?

    python -m benchmarks.agreement --device cuda

Random prompts go through gpt2-medium's shape with the same random weights on both, cut into a prefill and decode steps, so
that every kernel takes part; each is given the same tokens (teacher-forced). A greedy choice is only as certain as the gap
between the two best logits. Where the float32 gap is more than four times the largest error of that position's logits, the
choice has to be the same; the rest is counted. Exits with 1 if one differs that should not.
"""

import torch

from benchmarks.program import arguments
from kernels.batch import RaggedBatch
from model.device import kv_dtype
from model.engine import Loaded, load_model
from model.kv_cache import KVCache

PROMPTS, TOKENS, DECODES = 8, 96, 16
BLOCK_SIZE = 16
CERTAIN = 4.0  # times the measured error


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="gpt2-medium")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    reference = load_model(args.model, "random", "fp32", "cpu", fall_back=False)
    other = load_model(args.model, "random", args.dtype, args.device, fall_back=False)
    tokens = torch.randint(reference.tokenizer.vocab_size, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0))
    wanted, found = logits_of(reference, tokens), logits_of(other, tokens)
    error = (found - wanted).abs().amax(-1)
    best = wanted.topk(2).values
    certain = best[:, 0] - best[:, 1] > CERTAIN * error
    same = found.argmax(-1) == wanted.argmax(-1)
    print(f"{other.name}, {other.dtype} on {other.device} against fp32 on cpu: {len(same)} positions")
    print(f"logits' largest error {error.max():.2e}, its mean {error.mean():.2e}; spread of the logits {wanted.std():.2f}")
    print(f"certain {int(certain.sum())}, of these the same {int((same & certain).sum())}")
    print(f"uncertain {int((~certain).sum())}, of these the same {int((same & ~certain).sum())}")
    if not same[certain].all():
        raise SystemExit("a choice that is certain in float32 came out otherwise")


@torch.inference_mode()
def logits_of(loaded: Loaded, prompts: torch.Tensor) -> torch.Tensor:
    """(prompts * tokens, vocabulary) float32 on the CPU: a prefill of all prompts at once, then one token of each a step."""
    config, rows = loaded.model.config, len(prompts)
    width = -(-TOKENS // BLOCK_SIZE)
    sizes = (config.n_layer, rows * width, BLOCK_SIZE, config.n_head, config.head_size)
    cache = KVCache(*sizes, kv_dtype(loaded.dtype, loaded.device), loaded.device)
    tables = torch.randperm(rows * width, generator=torch.Generator().manual_seed(1)).view(rows, width)
    parts = []
    for first, last in [(0, TOKENS - DECODES), *((i, i + 1) for i in range(TOKENS - DECODES, TOKENS))]:
        columns = torch.arange(first, last).expand(rows, -1)
        slots = tables.gather(1, columns // BLOCK_SIZE) * BLOCK_SIZE + columns % BLOCK_SIZE
        begins = torch.arange(rows + 1) * (last - first)
        numbers = (begins, torch.full((rows,), first), torch.zeros(rows), tables)
        begins, starts, spans, table = (n.to(loaded.device, torch.int32) for n in numbers)
        batch = RaggedBatch(begins, starts, spans, table, slots.flatten().to(loaded.device))
        given = (prompts[:, first:last].flatten(), columns.flatten(), torch.arange(rows * (last - first)))
        flat, positions, sampled = (tensor.to(loaded.device) for tensor in given)
        logits = loaded.model(flat, positions, cache, batch, sampled)
        parts.append(logits.cpu().view(rows, last - first, -1))
    return torch.cat(parts, 1).flatten(0, 1)


if __name__ == "__main__":
    main()
