"""Ragged attention over the paged KV cache, for GPUs, in Triton: prefill chunks and decodes of one step in a single launch.

Read `decode_attention.py` first; this is its sibling for steps in which some row has more than one new token, as chunked
prefill and mixed batches have them. What is different:

**Tiles of queries.** A chunk of a prompt has many queries that all look at the same columns. A program takes 16 of a row at
once, so that a tile of K and V, once read, serves 16 queries, and the products are matrix products (`tl.dot`), for which GPUs
have their tensor cores. A row with a single query leaves 15 of the 16 empty: that costs arithmetic, which is not what such a
row waits for.

**Which tile is whose.** The queries of all rows lie one after the other, (tokens, heads, head size), row r at [begins[r],
begins[r+1]). The host does not count tiles, since that would need numbers that are on the device. Row r's first tile gets the
number begins[r] // 16 + r, which leaves enough numbers for every row; a program searches its row by that, and one whose
number nobody needs ends at once.

**Columns of this step.** A chunk's queries see each other, up to themselves. As in a decode step these columns are taken from
the inputs, so first comes a loop over the cache, and then one over the chunk.
"""

import torch
import triton
import triton.language as tl

from kernels.batch import RaggedBatch, check
from kernels.decode_attention import LOG2_E

QUERIES = 16  # the fewest that `tl.dot` takes
TILE = 64  # columns


def ragged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch
) -> torch.Tensor:
    """As `paged_attention`. Raises TypeError or ValueError, before the launch, for tensors that it cannot read."""
    check(q, k, v, k_cache, v_cache, batch)
    tokens, heads, head_size = q.shape
    rows, width = batch.tables.shape
    out = torch.empty((tokens, heads, head_size), dtype=q.dtype, device=q.device)
    _ragged[(tokens // QUERIES + rows, heads)](
        *(q, k, v, k_cache, v_cache, batch.begins, batch.starts, batch.spans, batch.tables, batch.slots, out),
        *(rows, q.stride(0), width, LOG2_E / head_size**0.5),
        HEADS=heads, HEAD_SIZE=head_size, BLOCK_SIZE=k_cache.shape[2], QUERIES=QUERIES, TILE=TILE,
    )  # fmt: skip
    return out


@triton.jit
def _ragged(
    q, k, v,  # (tokens, HEADS, HEAD_SIZE), q_stride numbers from token to token
    k_cache, v_cache,  # (blocks, HEADS, BLOCK_SIZE, HEAD_SIZE)
    begins, starts, spans, tables, slots,  # of the batch
    out,  # (tokens, HEADS, HEAD_SIZE)
    rows, q_stride, table_width, scale,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    row, beyond = 0, rows  # the last row whose first tile has no higher number, by bisection
    while beyond - row > 1:
        middle = (row + beyond) // 2
        if tl.load(begins + middle) // QUERIES + middle <= tile:
            row = middle
        else:
            beyond = middle
    begin, end = tl.load(begins + row), tl.load(begins + row + 1)
    first = begin + (tile - begin // QUERIES - row) * QUERIES
    if first >= end:
        return

    d = tl.arange(0, HEAD_SIZE)
    tokens = first + tl.arange(0, QUERIES)
    mine = tokens < end
    own = tokens[:, None].to(tl.int64) * q_stride + head * HEAD_SIZE + d[None, :]
    queries = tl.load(q + own, mask=mine[:, None], other=0.0)

    # These tokens' K and V, to their slots.
    slot = tl.load(slots + tokens, mask=mine, other=0)
    place = ((slot // BLOCK_SIZE * HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_SIZE
    new_keys = tl.load(k + own, mask=mine[:, None], other=0.0).to(k_cache.dtype.element_ty)
    new_values = tl.load(v + own, mask=mine[:, None], other=0.0).to(v_cache.dtype.element_ty)
    tl.store(k_cache + place[:, None] + d[None, :], new_keys, mask=mine[:, None])
    tl.store(v_cache + place[:, None] + d[None, :], new_values, mask=mine[:, None])

    peak = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, HEAD_SIZE), tl.float32)

    # The columns before this step, from the cache; masked, as far as the span, if it reaches beyond the row's own.
    start = tl.load(starts + row)
    after = start + end - begin
    span = tl.load(spans + row)
    read = tl.where(span > after, span, start)
    for column in range(0, read, TILE):
        columns = column + tl.arange(0, TILE)
        inside = columns < read
        blocks = tl.load(tables + row * table_width + columns // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        places = ((blocks * HEADS + head) * BLOCK_SIZE + columns % BLOCK_SIZE) * HEAD_SIZE
        cached = inside & ((columns < start) | (columns >= after))
        keys = tl.load(k_cache + places[:, None] + d[None, :], mask=cached[:, None], other=0.0).to(queries.dtype)
        values = tl.load(v_cache + places[:, None] + d[None, :], mask=cached[:, None], other=0.0).to(queries.dtype)
        seen = (columns < start)[None, :] & mine[:, None]
        peak, total, sums = _take_in(queries, keys, values, seen, scale, peak, total, sums)

    # Those of this step, from the inputs.
    for token in range(begin, tl.minimum(first + QUERIES, end), TILE):
        others = token + tl.arange(0, TILE)
        there = (others < end)[:, None]
        places = others[:, None].to(tl.int64) * q_stride + head * HEAD_SIZE + d[None, :]
        keys = tl.load(k + places, mask=there, other=0.0).to(k_cache.dtype.element_ty).to(queries.dtype)
        values = tl.load(v + places, mask=there, other=0.0).to(v_cache.dtype.element_ty).to(queries.dtype)
        seen = (others[None, :] <= tokens[:, None]) & mine[:, None]
        peak, total, sums = _take_in(queries, keys, values, seen, scale, peak, total, sums)

    own = (tokens[:, None].to(tl.int64) * HEADS + head) * HEAD_SIZE + d[None, :]
    total = tl.where(mine, total, 1.0)
    tl.store(out + own, (sums / total[:, None]).to(out.dtype.element_ty), mask=mine[:, None])


@triton.jit
def _take_in(queries, keys, values, seen, scale, peak, total, sums):
    """A tile of columns more in each query's online softmax. In float32 without the tensor cores' own shorter format."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    total = total * shrink + tl.sum(weights, 1)
    return higher, total, sums
