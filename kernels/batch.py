"""A step's batch as attention reads it, and what attention may be given."""

from dataclasses import dataclass
from functools import cached_property

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (16, 32, 64, 128)  # that there are Triton kernels for


@dataclass(frozen=True)
class RaggedBatch:
    """R rows, one request each, in T flattened tokens. All on the cache's device. On a CPU there may be tokens after the last
    row's: they belong to nobody, their K and V are not written, and attention gives 0 for them."""

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


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch
) -> None:
    """Raises TypeError or ValueError for what a kernel that reads raw memory cannot be given. Shapes as everywhere."""
    if q.dim() != 3:
        raise ValueError(f"q is {tuple(q.shape)}, not (tokens, heads, head size)")
    tokens, heads, head_size = q.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}, q is {tuple(q.shape)} {q.dtype}: they have to be alike")
        if tokens and (x.stride(2) != 1 or x.stride(1) != head_size or x.stride(0) != q.stride(0)):
            raise ValueError(f"{name}: strides {x.stride()}: a token's heads have to lie one after the other, tokens as q's do")
    if q.dtype not in FLOATS:
        raise TypeError(f"q, k, v are {q.dtype}, not one of {FLOATS}")
    if head_size not in HEAD_SIZES:
        raise ValueError(f"head size {head_size}: there are kernels for {', '.join(map(str, HEAD_SIZES))}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4 or x.shape != k_cache.shape or x.shape[1] != heads or x.shape[3] != head_size:
            raise ValueError(
                f"{name} is {tuple(x.shape)}, not (blocks, {heads} heads, block size, {head_size}), or not its twin"
            )
        if x.dtype not in FLOATS or x.dtype != k_cache.dtype:
            raise TypeError(f"{name} is {x.dtype}, not one of {FLOATS}, or not k_cache's dtype")
        if not x.is_contiguous():
            raise ValueError(f"{name} has to be contiguous")
    rows = batch.tables.shape[0]
    wanted = {
        "begins": (rows + 1,),
        "starts": (rows,),
        "spans": (rows,),
        "tables": tuple(batch.tables.shape),
        "slots": (tokens,),
    }
    for name, shape in wanted.items():
        x, dtype = getattr(batch, name), torch.int64 if name == "slots" else torch.int32
        if x.dtype != dtype or tuple(x.shape) != shape:
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}, not {shape} {dtype}")
        if not x.is_contiguous():
            raise ValueError(f"{name} has to be contiguous")
    others = {x.device for x in (k, v, k_cache, v_cache, *(getattr(batch, name) for name in wanted))} - {q.device}
    if others:
        raise ValueError(f"q is on {q.device}, others are on {others}")
