"""Causal attention over a paged KV cache for a ragged batch: any mix of prefill chunks and decodes in one call.

The plain torch implementation, which is the CPU's path and the reference for every kernel beside it. Each row reads its KV
blocks by its block table (Kwon et al. 2023, section 4.1); nothing is shared between rows, as in Orca's selective batching.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class RaggedRow:
    """One request's share of a flattened batch: tokens [begin, end) of it, at columns [start, start + end - begin)."""

    begin: int
    end: int
    start: int
    blocks: torch.Tensor  # (nb,) int64: the row's block table, as far as it is read
    mask: torch.Tensor | None  # (end - begin, columns read) bool, True: attend; None where plain causal order says it all

    @property
    def columns(self) -> int:
        """KV columns that hold the row's own context after this step."""
        return self.start + self.end - self.begin


@dataclass(frozen=True)
class RaggedBatch:
    rows: list[RaggedRow]
    slots: torch.Tensor  # (T,) int64: where each token's K and V are written, block * block_size + offset


def make_row(begin: int, start: int, count: int, blocks: torch.Tensor, block_size: int, span: int = 0) -> RaggedRow:
    """Describe `count` new tokens at columns `start` onwards of the block table `blocks` (nb,); at least `span` columns are
    read, the surplus masked."""
    read = max(start + count, span)
    mask = None
    if read > start + count or (count > 1 and start > 0):
        columns = torch.arange(read, device=blocks.device)
        mask = columns[None, :] <= columns[start : start + count, None]
    return RaggedRow(begin, begin + count, start, blocks[: -(-read // block_size)], mask)


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: RaggedBatch,
) -> torch.Tensor:
    """Write the new K and V into their slots, then attend. q, k, v: (T, nh, hs). Caches: (blocks, block_size, nh, hs), of a
    dtype of their own, in which the attention is computed. Returns (T, nh, hs) in q's dtype."""
    heads, head_size = k_cache.shape[2:]
    k_cache.view(-1, heads, head_size).index_copy_(0, batch.slots, k.to(k_cache.dtype))
    v_cache.view(-1, heads, head_size).index_copy_(0, batch.slots, v.to(v_cache.dtype))
    out = torch.empty_like(q)
    q = q.to(k_cache.dtype)
    for row in batch.rows:
        read = row.columns if row.mask is None else row.mask.shape[1]
        keys = k_cache.index_select(0, row.blocks).view(-1, heads, head_size)[:read]  # (columns, nh, hs)
        values = v_cache.index_select(0, row.blocks).view(-1, heads, head_size)[:read]
        y = F.scaled_dot_product_attention(
            q[row.begin : row.end].transpose(0, 1)[None],  # (1, nh, tokens, hs)
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=row.mask,
            is_causal=row.mask is None and row.end - row.begin > 1,
        )
        out[row.begin : row.end] = y[0].transpose(0, 1)
    return out
