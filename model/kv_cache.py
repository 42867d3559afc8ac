"""The paged KV cache's tensors: one K and one V a layer, in blocks that `batching/blocks.py` deals out by number."""

import torch


class KVCache:
    def __init__(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, heads, block_size, head_size)  # a head of a block is contiguous: what attention reads at a time
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
