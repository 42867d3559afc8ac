"""The two passes around an 8-bit matrix product on a processor, in Numba: activations to 8 bits, and sums back to float32.

Each is one walk over the data; in plain torch they are six operators and three, each with a walk of its own.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types

from kernels import cpu
from kernels.cpu import FAST, bits, compiled, draw, float_of, pointer
from kernels.gelu import gelu_of

# Without VNNI's 32-bit sums, processors add pairs of products in 16 bits, which 7-bit activations cannot overflow.
LEVELS = 255 if torch.cpu._is_vnni_supported() else 127


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (T, K) float32 to levels (T, K) uint8, scales (T,) and zero points (T,) float32: x = (levels - zero) * scale."""
    if x.dtype != torch.float32:
        raise TypeError(f"activations to quantize are float32, not {x.dtype}")
    x = x.contiguous()
    tokens, width = x.shape
    levels = torch.empty((tokens, width), dtype=torch.uint8)
    scales, zeros = torch.empty(tokens), torch.empty(tokens)
    cpu.run(_quantize, tokens, *(t.data_ptr() for t in (x, levels, scales, zeros)), tokens, width, LEVELS)
    return levels, scales, zeros


def scale_(
    sums: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor, gelu: bool
) -> torch.Tensor:
    """sums (T, N) in place to (sums - zeros * offsets) * scales + bias, with scales, zeros (T,) and offsets, bias (N,); and
    through GELU if so asked (its tanh approximation, as GPT-2 has it)."""
    tokens, width = sums.shape
    cpu.run(_scale, tokens, *(t.data_ptr() for t in (sums, scales, zeros, offsets, bias)), tokens, width, gelu)
    return sums


@compiled
def quantize_row(x, most, levels):
    """One token's activations to `levels`; their scale and zero point."""
    lowest = highest = np.int32(0)
    for i in range(len(x)):  # floats above 0 are ordered as their bits are, and of integers the compiler makes vector code
        lowest = max(lowest, bits(-x[i]))
        highest = max(highest, bits(x[i]))
    low, high = -float_of(lowest), float_of(highest)
    scale = max((high - low) / most, np.float32(1e-30))
    zero = np.floor(-low / scale + np.float32(0.5))
    inverse = np.float32(1) / scale
    for i in range(len(x)):
        level = x[i] * inverse + (zero + np.float32(0.5))
        levels[i] = np.int32(min(max(level, np.float32(0)), most))
    return scale, zero


@compiled
def scale_row(sums, scale, zero, offsets, bias, gelu):
    """One token's sums, or some of them, in place to outputs."""
    if gelu:
        for i in range(len(sums)):
            sums[i] = gelu_of((sums[i] - zero * offsets[i]) * scale + bias[i])
    else:
        for i in range(len(sums)):
            sums[i] = (sums[i] - zero * offsets[i]) * scale + bias[i]


@cfunc(cpu.SIGNATURE, cache=True, fastmath=FAST, error_model="numpy")
def _quantize(arguments: Any) -> None:
    a = carray(arguments, 8)
    tokens, width, most = a[5], a[6], np.float32(a[7])
    x = carray(pointer(a[1], types.float32), (tokens, width))
    levels = carray(pointer(a[2], types.uint8), (tokens, width))
    scales, zeros = carray(pointer(a[3], types.float32), tokens), carray(pointer(a[4], types.float32), tokens)
    while True:
        token = draw(arguments)
        if token >= tokens:
            break
        scales[token], zeros[token] = quantize_row(x[token], most, levels[token])


@cfunc(cpu.SIGNATURE, cache=True, fastmath=FAST, error_model="numpy")
def _scale(arguments: Any) -> None:
    a = carray(arguments, 9)
    tokens, width, gelu = a[6], a[7], a[8]
    sums = carray(pointer(a[1], types.float32), (tokens, width))
    scales, zeros = carray(pointer(a[2], types.float32), tokens), carray(pointer(a[3], types.float32), tokens)
    offsets, bias = carray(pointer(a[4], types.float32), width), carray(pointer(a[5], types.float32), width)
    while True:
        token = draw(arguments)
        if token >= tokens:
            break
        scale_row(sums[token], scales[token], zeros[token], offsets, bias, gelu)
