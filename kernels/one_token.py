"""A step of one token on a processor, in Numba: a transformer block as one kernel, and a linear layer as one.

With a single request a step has next to nothing to compute. What counts is how fast the weights come from memory, and every
operator that begins and ends by itself keeps memory waiting: a dozen a block. Here the threads go through a block together.
They share a layer's panels (`kernels/panels.py`) and the heads of attention, and whoever finds no piece left waits for the
others' last one, not for Python. What is short they do each for itself. The order of arithmetic is the batch's, so that a
token comes out the same alone or in company: in int8 by construction, in bfloat16 as far as oneDNN adds up as it was seen to
(`panels.CHUNK`).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types

from kernels import cpu
from kernels.cpu import STORED, announce, draw, pointer, wait_for
from kernels.cpu_attention import PIECES_A_THREAD, TILE, share_of_row
from kernels.layer_norm import normalize
from kernels.panels import PANEL, layer
from kernels.ragged_attention import RaggedBatch

COUNTERS = 10  # two for each part of a block that is shared out: a layer, attention, and three layers


def linear(x: torch.Tensor, addresses: Sequence[int], outputs: int, gelu: bool) -> torch.Tensor:
    """x (1, K) times the weights (N, K) in panels, to (1, N) of x's dtype; through GELU if so asked. `addresses` as
    `panels.layer` has them."""
    x = x.contiguous()
    y = torch.empty((1, outputs), dtype=x.dtype)
    kernel, pieces = _linear(STORED[x.dtype]), -(-outputs // PANEL)
    cpu.run(kernel, pieces, 0, *addresses, x.data_ptr(), y.data_ptr(), x.shape[1], outputs, gelu)
    return y


def block(
    x: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch, addresses: Sequence[int], epsilon: int
) -> torch.Tensor:
    """A block's output (1, C) for its input x (1, C), whose K and V are written into the caches as `ragged_attention` does.
    `addresses`: weight and bias of both layer norms, then, of each layer in the order they are used, those that `panels.layer`
    asks for. `epsilon`: the layer norms', by its bits."""
    x = x.contiguous()
    width = x.shape[1]
    heads, block_size, head_size = k_cache.shape[1:]
    y, between = torch.empty_like(x), torch.empty(9 * width, dtype=x.dtype)
    group = max(1, heads // (PIECES_A_THREAD * torch.get_num_threads()))
    cpu.run(
        _block(STORED[x.dtype], STORED[k_cache.dtype]),
        torch.get_num_threads(),
        *(0,) * (COUNTERS - 1),
        *addresses,
        *(tensor.data_ptr() for tensor in (x, y, between, k_cache, v_cache)),
        *(tensor.data_ptr() for tensor in (batch.begins, batch.starts, batch.spans, batch.tables, batch.slots)),
        *(width, batch.tables.shape[1], k_cache.shape[0], block_size, heads, head_size, group, epsilon),
    )
    return y


@cache
def _linear(stored: Any) -> Any:
    """Compiled at the first call, since not every processor has the instruction, and kept on disk."""

    @cfunc(cpu.SIGNATURE, cache=True)
    def kernel(arguments):
        a = carray(arguments, 11)
        x, y = carray(pointer(a[6], stored), a[8]), carray(pointer(a[7], stored), a[9])
        layer(a.ctypes.data, x, a[2:6], a[10], x[:0], y)

    return kernel


@cache
def _block(stored: Any, cached: Any) -> Any:
    @cfunc(cpu.SIGNATURE, cache=True)
    def kernel(arguments):
        a = carray(arguments, 48)
        counters = a.ctypes.data
        norms, layers, tensors, sizes = a[10:14], a[14:30], a[30:40], a[40:48]
        width, blocks_a_row, blocks, block_size = sizes[0], sizes[1], sizes[2], sizes[3]
        heads, head_size, group, epsilon = sizes[4], sizes[5], sizes[6], sizes[7]
        x, y = carray(pointer(tensors[0], stored), width), carray(pointer(tensors[1], stored), width)
        between = carray(pointer(tensors[2], stored), 9 * width)
        qkv, middle, wide = between[: 3 * width], between[3 * width : 5 * width], between[5 * width :]
        attended, halfway = middle[:width], middle[width:]
        k_cache = carray(pointer(tensors[3], cached), (blocks, heads, block_size, head_size))
        v_cache = carray(pointer(tensors[4], cached), (blocks, heads, block_size, head_size))
        begins, starts = carray(pointer(tensors[5], types.int32), 2), carray(pointer(tensors[6], types.int32), 1)
        spans, slots = carray(pointer(tensors[7], types.int32), 1), carray(pointer(tensors[9], types.int64), 1)
        tables = carray(pointer(tensors[8], types.int32), (1, blocks_a_row))
        normed = np.empty_like(x)

        norm(x, norms[0:2], epsilon, normed)
        layer(counters, normed, layers[0:4], False, x[:0], qkv)
        rows, out = qkv.reshape((3, 1, width)), attended.reshape((1, width))
        queries, sums = np.empty((group * TILE, head_size), np.float32), np.empty((group * TILE, head_size), np.float32)
        scores = np.empty((group * TILE, blocks_a_row * block_size), np.float32)
        pieces = -(-heads // group)
        while True:
            piece = draw(pointer(counters + 16, types.int64))
            if piece >= pieces:
                break
            low, high = piece * group, min(heads, (piece + 1) * group)
            share_of_row(
                *(rows[0], rows[1], rows[2], out, k_cache, v_cache, begins, starts, spans, tables, slots, 0, low, high),
                *(queries, sums, scores),
            )
            announce(pointer(counters + 24, types.int64))
        wait_for(pointer(counters + 24, types.int64), pieces)
        layer(counters + 32, attended, layers[4:8], False, x, halfway)
        norm(halfway, norms[2:4], epsilon, normed)
        layer(counters + 48, normed, layers[8:12], True, x[:0], wide)
        layer(counters + 64, wide, layers[12:16], False, halfway, y)

    return kernel


@cpu.compiled
def norm(x, addresses, epsilon, y):
    weight = carray(pointer(addresses[0], y.dtype), len(x))
    normalize(x, weight, carray(pointer(addresses[1], y.dtype), len(x)), epsilon, y)
