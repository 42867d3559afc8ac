"""How fast decode attention reads its paged KV cache, beside other implementations and the device's own copy.

    python -m benchmarks.kernels --device cuda

A decode step's attention in gpt2-medium's shape (16 heads of 64): every row has one new token and the same context. What is
read, all keys and values once, divided by the time is the bandwidth; "of copy" compares it with a copy from memory to memory.
The others: torch's scaled_dot_product_attention and FlexAttention on a cache that was gathered before (they cannot read a
paged one, or not without a mask; gathering is not timed), and FlashInfer on the same paged cache, where it is installed. On a
GPU each is captured in a graph that goes over several caches, larger together than the GPU's own cache as far as there is
memory; the median of many replays counts. "error" is against float64 on fresh random inputs, relative.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.program import arguments, text, write_csv
from kernels.attention import paged_attention
from kernels.batch import RaggedBatch

BATCHES = (1, 8, 64, 256)
CONTEXTS = (128, 512, 1024)
HEADS, HEAD_SIZE, BLOCK_SIZE = 16, 64, 16
SEVERAL_BYTES = 512 << 20  # of caches to go over
MOST_CACHES = 256
SECONDS = 0.2  # of replays for each figure, at least
COPY_BYTES = 1 << 30


@dataclass
class Measured:
    kernel: str
    batch: int
    context: int
    microseconds: float
    gb_per_s: float
    of_copy: float
    error: float | None


class Inputs:
    """A decode step over random caches: of `batch` rows, each with `context` columns, the new one among them."""

    def __init__(self, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch, self.context, self.dtype = batch, context, dtype
        blocks = -(-context // BLOCK_SIZE)
        self.num_bytes = 2 * batch * context * HEADS * HEAD_SIZE * dtype.itemsize
        count = min(MOST_CACHES, max(1, SEVERAL_BYTES // self.num_bytes)) if device.type == "cuda" else 4
        shape = (batch * blocks, HEADS, BLOCK_SIZE, HEAD_SIZE)
        self.caches = [[torch.randn(shape, device=device).to(dtype) for _ in range(2)] for _ in range(count)]
        self.qkv = torch.randn(batch, 3, HEADS, HEAD_SIZE, device=device).to(dtype)
        tables = torch.randperm(batch * blocks, device=device).view(batch, blocks)
        starts = torch.full((batch,), context - 1, device=device)
        slots = tables[:, -1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        begins = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self.ragged = RaggedBatch(begins, starts.int(), torch.zeros_like(starts).int(), tables.int(), slots)

    def gathered(self, cache: torch.Tensor) -> torch.Tensor:
        """(batch, heads, context, head size), the new column left as it was."""
        rows = cache[self.ragged.tables.long()].transpose(1, 2)  # (batch, heads, blocks, block size, head size)
        return rows.reshape(self.batch, HEADS, -1, HEAD_SIZE)[:, :, : self.context].contiguous()

    def exact(self) -> torch.Tensor:
        """In float64, for the first of the caches, the new column among its columns."""
        q, k, v = self.qkv.double().unbind(1)
        keys, values = (self.gathered(cache).double() for cache in self.caches[0])
        keys[:, :, -1], values[:, :, -1] = k, v
        return F.scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]


Calls = list[Callable[[], torch.Tensor]]  # one for each cache
Make = Callable[[Inputs], Calls]


def ours(inputs: Inputs) -> Calls:
    q, k, v = inputs.qkv.unbind(1)
    return [partial(paged_attention, q, k, v, keys, values, inputs.ragged) for keys, values in inputs.caches]


def _on_gathered(attend: Callable[..., torch.Tensor]) -> Make:
    def make(inputs: Inputs) -> Calls:
        q, k, v = inputs.qkv.unbind(1)
        calls: Calls = []
        for cache in inputs.caches:
            keys, values = map(inputs.gathered, cache)
            keys[:, :, -1], values[:, :, -1] = k, v
            calls.append(partial(_attend, attend, q, keys, values))
        return calls

    return make


def _attend(attend: Callable[..., torch.Tensor], q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return attend(q[:, :, None], keys, values)[:, :, 0]


def flex(inputs: Inputs) -> Calls:
    from torch.nn.attention.flex_attention import flex_attention

    return _on_gathered(torch.compile(flex_attention, dynamic=False))(inputs)


def flashinfer(inputs: Inputs) -> Calls:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    device, blocks = inputs.qkv.device, inputs.ragged.tables.shape[1]
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    first = torch.arange(inputs.batch + 1, dtype=torch.int32, device=device) * blocks
    last = torch.full((inputs.batch,), (inputs.context - 1) % BLOCK_SIZE + 1, dtype=torch.int32, device=device)
    sizes = (HEADS, HEADS, HEAD_SIZE, BLOCK_SIZE)
    wrapper.plan(first, inputs.ragged.tables.flatten(), last, *sizes, q_data_type=inputs.dtype, kv_data_type=inputs.dtype)
    q, k, v = (part.contiguous() for part in inputs.qkv.unbind(1))
    slots = inputs.ragged.slots
    for keys, values in inputs.caches:  # it reads the new column from the cache too
        keys[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = k
        values[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = v
    return [partial(wrapper.run, q, tuple(cache)) for cache in inputs.caches]


KERNELS: dict[str, Make] = {
    "ours": ours,
    "SDPA, gathered": _on_gathered(F.scaled_dot_product_attention),
    "FlexAttention, gathered": flex,
    "FlashInfer": flashinfer,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--csv", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    copy = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{device} ({name}), torch {torch.__version__}, {args.dtype}; copies {copy / 1e9:.0f} GB/s, read and written\n")
    rows: list[Measured] = []
    for batch in map(int, args.batches.split(",")):
        for context in map(int, args.contexts.split(",")):
            rows += measure(Inputs(batch, context, dtype, device), copy)
    print_table(rows)
    if args.csv:
        write_csv(args.csv, map(asdict, rows))


@torch.inference_mode()
def measure(inputs: Inputs, copy: float) -> list[Measured]:
    """One batch and context, by every implementation that is there."""
    exact, rows = inputs.exact(), []
    for name, make in KERNELS.items():
        try:
            if make in (flex, flashinfer) and inputs.qkv.device.type != "cuda":
                continue
            calls = make(inputs)
            error = ((calls[0]() - exact).norm() / exact.norm()).item()
            seconds = time_of(calls, inputs.qkv.device)
        except ModuleNotFoundError as missing:
            print(f"{name}: not installed: {missing.name}")
            continue
        except Exception as failure:  # the others go on
            print(f"{name}, batch {inputs.batch}, context {inputs.context}: {type(failure).__name__}: {failure}"[:300])
            continue
        speed = inputs.num_bytes / seconds
        rows.append(Measured(name, inputs.batch, inputs.context, seconds * 1e6, speed / 1e9, speed / copy, error))
    return rows


def time_of(calls: Calls, device: torch.device) -> float:
    """Seconds of one call, the median over many rounds through all of them."""
    if device.type == "cpu":
        return median(lambda: [call() for call in calls], device) / len(calls)
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median(graph.replay, device) / len(calls)


def median(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call; on a GPU by its own clock."""
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begun < SECONDS:
        if device.type == "cpu":
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        else:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, those read and those written together."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median(lambda: target.copy_(source), device)


def print_table(rows: list[Measured]) -> None:
    table = [["kernel", "batch", "context", "us", "GB/s", "of copy", "error"]]
    for row in rows:
        figures = [f"{row.microseconds:.1f}", f"{row.gb_per_s:.0f}", f"{row.of_copy:.0%}", f"{row.error:.1e}"]
        table.append([row.kernel, str(row.batch), str(row.context), *figures])
    print(text(table))


if __name__ == "__main__":
    main()
