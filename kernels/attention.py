"""Causal attention over a paged KV cache for a ragged batch: any mix of prefill chunks and decodes in one call.

Each row reads its KV blocks by its block table (Kwon et al. 2023, section 4.1); nothing is shared between rows, as in Orca's
selective batching. The engine calls `paged_attention`, and the device decides: a Numba kernel on a CPU, Triton kernels on a GPU
that has them, elsewhere plain torch, which is also what the kernels are tested against.
"""

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F

from kernels import cpu_attention
from kernels.batch import HEAD_SIZES, RaggedBatch

TRITON_CAPABILITY = (8, 0)  # of an NVIDIA GPU: Ampere and later; a T4 has 7.5


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: RaggedBatch,
) -> torch.Tensor:
    """Write the new K and V into their slots, then attend. q, k, v: (T, nh, hs). Caches: (blocks, nh, block_size, hs), of a
    dtype of their own. Returns (T, nh, hs) in q's dtype."""
    if has_triton(q.device) and q.shape[2] in HEAD_SIZES:
        from kernels import decode_attention, ragged_attention  # elsewhere there may be no triton at all

        one_each = q.shape[0] == batch.tables.shape[0]
        kernel = decode_attention.decode_attention if one_each else ragged_attention.ragged_attention
        return kernel(q, k, v, k_cache, v_cache, batch)
    on_cpu = q.device.type == "cpu" and {q.dtype, k_cache.dtype} <= cpu_attention.STORED.keys()
    return (cpu_attention.attention if on_cpu else plain_attention)(q, k, v, k_cache, v_cache, batch)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels serve this device."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY


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
    tokens = int(batch.begins[-1])
    blocks, offsets = batch.slots[:tokens] // block_size, batch.slots[:tokens] % block_size
    k_cache[blocks, :, offsets] = k[:tokens].to(k_cache.dtype)
    v_cache[blocks, :, offsets] = v[:tokens].to(v_cache.dtype)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for row, (begin, end, start, span) in enumerate(batch.rows):
        read = max(start + end - begin, span)
        table = batch.tables[row, : -(-read // block_size)].long()
        keys, values = (cache[table].transpose(0, 1).reshape(heads, -1, head_size)[:, :read] for cache in (k_cache, v_cache))
        columns = torch.arange(read, device=q.device)
        visible = columns[None, :] <= columns[start : start + end - begin, None]  # (tokens, columns)
        queries = q[begin:end].transpose(0, 1).to(k_cache.dtype)  # (nh, tokens, hs)
        out[begin:end] = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible).transpose(0, 1)
    return out
