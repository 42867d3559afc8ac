"""A step of one token on a processor, in Numba: a transformer block as one kernel, and a linear layer as one.

With a single request a step has next to nothing to compute. What counts is how fast the weights come from memory, and every
operator that begins and ends by itself keeps memory waiting: a dozen a block. Here the threads go through a block together.
They share a layer's panels (`kernels/panels.py`) and the heads of attention, and whoever finds no piece left waits for the
others' last one, not for Python. What is short they do each for itself.

A token comes out the same alone or in company, to the last bit: attention and layer norm are the batch's own compiled kernels,
products of int8 are exact, and products in bfloat16 are added up in the order in which oneDNN was seen to do it
(`panels.CHUNK`).
"""

from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from kernels import cpu, cpu_attention, layer_norm
from kernels.batch import RaggedBatch
from kernels.cpu import STORED, call, pointer, wait_for
from kernels.cpu_attention import DONE
from kernels.panels import PANEL, layer

COUNTERS = 8  # two for each layer of a block
ATTENDED = 3  # widths from the first of the numbers between the layers to what comes out of attention


def linear(x: torch.Tensor, addresses: Sequence[int], outputs: int, gelu: bool) -> torch.Tensor:
    """x (1, K) times the weights (N, K) in panels, to (1, N) of x's dtype; through GELU if so asked. `addresses` as
    `panels.layer` has them."""
    x = x.contiguous()
    y = torch.empty((1, outputs), dtype=x.dtype)
    kernel, pieces = _linear(STORED[x.dtype]), -(-outputs // PANEL)
    cpu.run(kernel, pieces, 0, *addresses, x.data_ptr(), y.data_ptr(), x.shape[1], outputs, gelu)
    return y


def block(
    x: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: RaggedBatch,
    addresses: Sequence[int],
    inner: int,
    epsilon: int,
) -> torch.Tensor:
    """A block's output (1, C) for its input x (1, C), whose K and V are written into the caches as `paged_attention` does.
    `addresses`: weight and bias of both layer norms, then, of each layer in the order they are used, those that `panels.layer`
    asks for. `inner`: the width of the MLP. `epsilon`: the layer norms', by its bits."""
    x = x.contiguous()
    width = x.shape[1]
    y, between = torch.empty_like(x), torch.empty((ATTENDED + 2) * width + inner, dtype=x.dtype)
    q, size = between.data_ptr(), width * x.element_size()
    pieces, arguments = cpu_attention.describe(
        q, q + size, q + 2 * size, q + ATTENDED * size, 3 * width, k_cache, v_cache, batch
    )
    attention = array("q", arguments)
    cpu.run(
        _block(STORED[x.dtype]),
        torch.get_num_threads(),
        *(0,) * (COUNTERS - 1),
        *addresses,
        *(x.data_ptr(), y.data_ptr(), q, width, layer_norm.kernel_for(x.dtype).address, epsilon),
        *(cpu_attention.kernel_for(x.dtype, k_cache.dtype).address, attention.buffer_info()[0], pieces, inner),
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
def _block(stored: Any) -> Any:
    @cfunc(cpu.SIGNATURE, cache=True)
    def kernel(arguments):
        a = carray(arguments, 38)
        counters, norms, layers, width, inner = a.ctypes.data, a[8:12], a[12:28], a[31], a[37]
        x, y = carray(pointer(a[28], stored), width), carray(pointer(a[29], stored), width)
        between = carray(pointer(a[30], stored), 5 * width + inner)
        qkv, attended = between[: 3 * width], between[3 * width : 4 * width]
        halfway, wide = between[4 * width : 5 * width], between[5 * width :]
        normed = np.empty_like(x)

        norm(a, x, norms[0:2], normed)
        layer(counters, normed, layers[0:4], False, x[:0], qkv)
        call(a[34], pointer(a[35], types.int64))  # the threads share its pieces too
        wait_for(pointer(a[35] + DONE, types.int64), a[36])
        layer(counters + 16, attended, layers[4:8], False, x, halfway)
        norm(a, halfway, norms[2:4], normed)
        layer(counters + 32, normed, layers[8:12], True, x[:0], wide)
        layer(counters + 48, wide, layers[12:16], False, halfway, y)

    return kernel


@njit
def norm(a, x, addresses, y):
    """By each thread for itself. Returns the number of draws, which keeps the arguments in memory until it is done."""
    own = np.zeros(8, np.int64)
    own[1], own[2], own[3], own[4] = x.ctypes.data, addresses[0], addresses[1], y.ctypes.data
    own[5], own[6], own[7] = 1, len(x), a[33]
    call(a[32], pointer(own.ctypes.data, types.int64))
    return own[0]
