"""What 16 and 8 bits cost in quality: the bundled demo model's perplexity on text it has not seen, for every dtype.

    python -m benchmarks.perplexity FOLDER_WITH_THE_BOOKS

The books are those it was trained on (model/demo/README.md), of which the last 5% were held out. Each window of the context
is scored from its second token on, through the same forward pass and paged KV cache that the server uses.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.program import arguments
from kernels.batch import RaggedBatch
from model.device import kv_dtype
from model.engine import Loaded, load_model
from model.kv_cache import KVCache

HELD_OUT = 0.05
DTYPES = ("fp32", "bf16", "int8")
BLOCK_SIZE = 16


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("books", type=Path, help="a folder of .txt files")
    books = [path.read_text("ascii") for path in sorted(parser.parse_args().books.glob("*.txt"))]
    texts = [text[int(len(text) * (1 - HELD_OUT)) :] for text in books]
    print(f"{'dtype':6} {'perplexity':>10} {'to fp32':>8} {'bits a byte':>11}")
    reference = 0.0
    for dtype in DTYPES:
        loaded = load_model("demo", "pretrained", dtype, "cpu", fall_back=False)
        nats, scored = measure(loaded, texts)
        perplexity = math.exp(nats / scored)
        reference = reference or perplexity
        bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
        print(f"{dtype:6} {perplexity:10.3f} {perplexity / reference - 1:+8.2%} {bits:11.4f}", flush=True)


def measure(loaded: Loaded, texts: list[str]) -> tuple[float, int]:
    """The loss in nats over all windows of all texts, and the tokens it is the sum of."""
    config = loaded.model.config
    num_blocks = -(-config.block_size // BLOCK_SIZE)
    dtype = kv_dtype(loaded.dtype, loaded.device)
    cache = KVCache(config.n_layer, num_blocks, BLOCK_SIZE, config.n_head, config.head_size, dtype, loaded.device)
    nats, scored = 0.0, 0
    for text in texts:
        for window in torch.tensor(loaded.tokenizer.encode(text)).split(config.block_size):
            nats += window_loss(loaded, cache, window)
            scored += len(window) - 1
    return nats, scored


@torch.inference_mode()
def window_loss(loaded: Loaded, cache: KVCache, window: torch.Tensor) -> float:
    """The summed loss in nats of each token of `window` given those before it."""
    count = len(window)
    columns = torch.arange(count)
    zero = torch.zeros(1, dtype=torch.int32)
    table = torch.arange(len(cache.k[0]), dtype=torch.int32)[None]
    batch = RaggedBatch(torch.tensor([0, count], dtype=torch.int32), zero, zero, table, columns)
    logits = loaded.model(window, columns, cache, batch, columns)
    return F.cross_entropy(logits[:-1], window[1:], reduction="sum").item()


if __name__ == "__main__":
    main()
