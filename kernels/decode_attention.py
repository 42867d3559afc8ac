"""Fused decode attention over the paged KV cache, for GPUs, in Triton: what a decode step does between two matrix products.

In a decode step every row of the batch has one new token. For each row and head there is one query q, and a cache of keys and
values, C columns of them, in blocks that lie anywhere (Kwon et al. 2023). Wanted is

    out = softmax(q @ K.T / sqrt(head_size)) @ V

with the new token's own K and V as the last column, which also have to be written into the cache. There are two
multiplications for every number read, so the time is that of reading K and V once. Everything here serves to read them once,
and to keep the whole GPU reading.

For a reader who knows PyTorch but not Triton: a Triton kernel is written for one *program*, and launched as a grid of them;
the GPU runs hundreds side by side, in any order, and they share nothing but memory. A program computes with small tensors,
*tiles*, that live in registers: `tl.arange(0, 64)` is one, `tl.load(pointer + tile)` reads an element for each of its
numbers, `mask` says which of them may be read at all. `tl.constexpr` arguments are known when the kernel is compiled.

    grid = (rows, heads, splits)         one program: one row, one head, a part of its columns

    program (r, h, s):  q (head_size,) ─┐
      for 64 columns at a time:         │    K tile (64, head_size) ── scores (64,) ── weights (64,) ──┐
        block numbers from the table ───┴──► V tile (64, head_size) ───────────────────────────────────┴─► sums (head_size,)

**Online softmax** (Milakov and Gimelshein 2018). The softmax needs the largest score first, which would be a second walk over
K. Instead a program keeps the largest score so far; when a tile brings a larger one, what was summed up is scaled down to it.

**The split** (flash-decoding, Dao et al. 2023). A row and head is one program's work, and one program keeps only a fraction
of a GPU's memory busy. 64 rows of 16 heads are 1,024 programs, enough for every multiprocessor to have several. But one
request is 16 programs on 132 multiprocessors. Then each row's columns are split among several programs. Each leaves behind
its sums, its largest score and the sum of its weights, and a second small kernel puts those together as the online softmax
would have.

**Who writes the new column.** The split to whose part it belongs. All programs take the new K and V from the inputs, none
from the cache, so that nobody can read what is just being written.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from kernels.batch import RaggedBatch, check

TILE = 64  # columns
MOST_SPLITS = 16
PROGRAMS_A_MULTIPROCESSOR = 4  # at least, before a row is split further
LOG2_E = 1.4426950408889634  # the hardware's exponential has base 2


def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch
) -> torch.Tensor:
    """As `paged_attention`, for a batch whose rows have one token each. Raises TypeError or ValueError, before the launch, for
    tensors that it cannot read."""
    check(q, k, v, k_cache, v_cache, batch)
    rows, heads, head_size = q.shape
    if batch.tables.shape[0] != rows:
        raise ValueError(f"a decode step has a token a row; these are {rows} tokens in {batch.tables.shape[0]} rows")
    out = torch.empty((rows, heads, head_size), dtype=q.dtype, device=q.device)
    splits = _splits(rows * heads, batch.tables.shape[1] * k_cache.shape[2], q.device)
    partial = out if splits == 1 else torch.empty((rows, heads, splits, head_size), device=q.device)
    peaks, totals = (partial if splits == 1 else torch.empty((rows, heads, splits), device=q.device) for _ in range(2))
    _decode[(rows, heads, splits)](
        *(q, k, v, k_cache, v_cache, batch.starts, batch.spans, batch.tables, batch.slots, partial, peaks, totals),
        *(q.stride(0), batch.tables.shape[1], LOG2_E / head_size**0.5),
        HEADS=heads, HEAD_SIZE=head_size, BLOCK_SIZE=k_cache.shape[2], TILE=TILE, SPLITS=splits,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows, heads)](partial, peaks, totals, out, HEADS=heads, HEAD_SIZE=head_size, SPLITS=splits)
    return out


def _splits(programs: int, columns: int, device: torch.device) -> int:
    """A power of 2: enough for the device to be busy, and none without a tile to read."""
    splits = 1
    while splits < MOST_SPLITS and programs * splits < _enough(device) and splits * TILE < columns:
        splits *= 2
    return splits


@cache
def _enough(device: torch.device) -> int:
    """Programs that keep the device busy; in the interpreter, which has no device, those of a large GPU."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return PROGRAMS_A_MULTIPROCESSOR * multiprocessors


@triton.jit
def _decode(
    q, k, v,  # (rows, HEADS, HEAD_SIZE), q_stride numbers from row to row
    k_cache, v_cache,  # (blocks, HEADS, BLOCK_SIZE, HEAD_SIZE)
    starts, spans, tables, slots,  # of the batch
    partial, peaks, totals,  # of each split: its sums (rows, HEADS, SPLITS, HEAD_SIZE), and two numbers
    q_stride, table_width, scale,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, HEAD_SIZE)
    own = row * q_stride + head * HEAD_SIZE + d  # this row's and head's numbers in q, k and v
    query = tl.load(q + own).to(tl.float32) * scale

    start = tl.load(starts + row)  # the new column; those before it are in the cache
    read = tl.maximum(start + 1, tl.load(spans + row))  # a static batch reads, masked, as far as its longest row
    part = tl.cdiv(tl.cdiv(read, TILE), SPLITS) * TILE
    first = split * part
    last = tl.minimum(first + part, read)

    peak = -float("inf")
    total = 0.0
    sums = tl.zeros((HEAD_SIZE,), tl.float32)
    for column in range(first, last, TILE):
        columns = column + tl.arange(0, TILE)
        inside = columns < last
        blocks = tl.load(tables + row * table_width + columns // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        places = ((blocks * HEADS + head) * BLOCK_SIZE + columns % BLOCK_SIZE) * HEAD_SIZE  # of each column's K, and V
        cached = inside & (columns != start)
        keys = tl.load(k_cache + places[:, None] + d[None, :], mask=cached[:, None], other=0.0).to(tl.float32)
        scores = tl.where(columns < start, tl.sum(keys * query[None, :], 1), -float("inf"))
        values = tl.load(v_cache + places[:, None] + d[None, :], mask=cached[:, None], other=0.0).to(tl.float32)
        higher = tl.maximum(peak, tl.max(scores, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen yet: no column of this tile counts
        weights = tl.exp2(scores - base)
        shrink = tl.exp2(peak - base)
        sums = sums * shrink + tl.sum(weights[:, None] * values, 0)
        total = total * shrink + tl.sum(weights, 0)
        peak = higher

    if (first <= start) & (start < last):  # the new column is this program's
        slot = tl.load(slots + row)
        place = ((slot // BLOCK_SIZE * HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_SIZE + d
        key = tl.load(k + own).to(k_cache.dtype.element_ty)  # rounded as the next step will find it
        value = tl.load(v + own).to(v_cache.dtype.element_ty)
        tl.store(k_cache + place, key)
        tl.store(v_cache + place, value)
        score = tl.sum(key.to(tl.float32) * query, 0)
        higher = tl.maximum(peak, score)
        weight = tl.exp2(score - higher)
        shrink = tl.exp2(peak - higher)
        sums = sums * shrink + weight * value.to(tl.float32)
        total = total * shrink + weight
        peak = higher

    place = (row * HEADS + head) * SPLITS + split
    if SPLITS == 1:
        tl.store(partial + place * HEAD_SIZE + d, (sums / total).to(partial.dtype.element_ty))
    else:
        tl.store(partial + place * HEAD_SIZE + d, sums)
        tl.store(peaks + place, peak)
        tl.store(totals + place, total)


@triton.jit
def _combine(
    partial, peaks, totals,  # as `_decode` left them
    out,  # (rows, HEADS, HEAD_SIZE)
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * HEADS + tl.program_id(1)
    d, splits = tl.arange(0, HEAD_SIZE), place * SPLITS + tl.arange(0, SPLITS)
    peak = tl.load(peaks + splits)
    weights = tl.exp2(peak - tl.max(peak, 0))  # a split without columns has a peak of -inf, and weighs nothing
    total = tl.sum(weights * tl.load(totals + splits), 0)
    sums = tl.sum(weights[:, None] * tl.load(partial + splits[:, None] * HEAD_SIZE + d[None, :]), 0)
    tl.store(out + place * HEAD_SIZE + d, (sums / total).to(out.dtype.element_ty))
