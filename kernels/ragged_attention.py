"""Causal attention over a paged KV cache for a ragged batch: any mix of prefill chunks and decodes in one call.

Each row reads its KV blocks by its block table (Kwon et al. 2023, section 4.1); nothing is shared between rows, as in Orca's
selective batching. The engine calls `ragged_attention`, and the device decides: on a CPU the Numba kernel, elsewhere plain
torch, which is also what the kernels are tested against.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from kernels import cpu_attention


@dataclass(frozen=True)
class RaggedBatch:
    """R rows, one request each, in T flattened tokens. All on the cache's device."""

    begins: torch.Tensor  # (R + 1,) int32: row r has the tokens [begins[r], begins[r + 1])
    starts: torch.Tensor  # (R,) int32: the KV column of its first token; so many columns were there before
    spans: torch.Tensor  # (R,) int32: at least so many columns are read, those beyond the row's own masked
    tables: torch.Tensor  # (R, most blocks of a row) int32: block tables; what lies beyond a row's last block is not read
    slots: torch.Tensor  # (T,) int64: where each token's K and V are written, block * block_size + offset

    @cached_property
    def rows(self) -> list[tuple[int, int, int, int]]:
        """begin, end, start and span of each row on the host."""
        begins = self.begins.tolist()
        return list(zip(begins, begins[1:], self.starts.tolist(), self.spans.tolist(), strict=False))


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: RaggedBatch,
) -> torch.Tensor:
    """Write the new K and V into their slots, then attend. q, k, v: (T, nh, hs). Caches: (blocks, nh, block_size, hs), of a
    dtype of their own. Returns (T, nh, hs) in q's dtype."""
    on_cpu = q.device.type == "cpu" and {q.dtype, k_cache.dtype} <= cpu_attention.STORED.keys()
    return (cpu_attention.attention if on_cpu else plain_attention)(q, k, v, k_cache, v_cache, batch)


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: RaggedBatch,
) -> torch.Tensor:
    """The same in plain torch, row by row: gathers each row's blocks, then attends in the cache's dtype."""
    heads, block_size, head_size = k_cache.shape[1:]
    blocks, offsets = batch.slots // block_size, batch.slots % block_size
    k_cache[blocks, :, offsets] = k.to(k_cache.dtype)
    v_cache[blocks, :, offsets] = v.to(v_cache.dtype)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for row, (begin, end, start, span) in enumerate(batch.rows):
        read = max(start + end - begin, span)
        table = batch.tables[row, : -(-read // block_size)].long()
        keys, values = (cache[table].transpose(0, 1).reshape(heads, -1, head_size)[:, :read] for cache in (k_cache, v_cache))
        columns = torch.arange(read, device=q.device)
        visible = columns[None, :] <= columns[start : start + end - begin, None]  # (tokens, columns)
        queries = q[begin:end].transpose(0, 1).to(k_cache.dtype)  # (nh, tokens, hs)
        out[begin:end] = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible).transpose(0, 1)
    return out
