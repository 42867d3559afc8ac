"""An 8-bit linear layer for one token, in Numba: most of what a step of a single request consists of.

For one token the product is a walk over the weights, as fast as memory hands them out, and what each operator costs by itself
counts too. So here activations to 8 bits, product, scaling and GELU are one kernel; each number comes out as it does from
`kernels/quantize.py` and oneDNN's product, bit for bit. It reads the weights where oneDNN has packed them on processors with
AVX512-VNNI: in panels of 64 outputs, and in a panel, for every four inputs, the four weights of each output.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels import cpu
from kernels.cpu import draw, pointer
from kernels.quantize import LEVELS, quantize_row, scale_row

PANEL = 64  # outputs
LANES = 16  # outputs of one instruction
STEP = 4  # inputs, that one instruction multiplies and adds up
DOT = "llvm.x86.avx512.vpdpbusd.512"
WORD, LONG = ir.IntType(32), ir.IntType(64)


def can_read(packed: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `packed` has the int8 `weight` (N, K) in panels, and this processor the instruction to multiply by them."""
    outputs, inputs = weight.shape
    size, last = PANEL * inputs, (outputs - 1) // PANEL
    if not llvm.get_host_cpu_features().get("avx512vnni") or inputs % STEP or outputs < PANEL:
        return False
    if torch.ops.mkldnn._nbytes(packed) < (last + 1) * size:
        return False
    for panel in (0, last):
        found = (ctypes.c_int8 * size).from_address(torch.ops.mkldnn.data_ptr(packed) + panel * size)
        expected = torch.zeros(PANEL, inputs, dtype=torch.int8)  # what is missing in the last one
        expected[: outputs - panel * PANEL] = weight[panel * PANEL : (panel + 1) * PANEL]
        if bytes(found) != expected.view(PANEL, -1, STEP).transpose(0, 1).contiguous().numpy().tobytes():
            return False
    return True


def linear(x: torch.Tensor, addresses: Sequence[int], outputs: int, gelu: bool) -> torch.Tensor:
    """x (1, K) float32 times weights (N, K) that `can_read` has seen, to (1, N) float32; through GELU if so asked. `addresses`:
    of the weights, and, (N,) float32 each, of an output's scale, the sum of its scaled weights, and what is added."""
    if x.dtype != torch.float32:
        raise TypeError(f"activations to quantize are float32, not {x.dtype}")
    x = x.contiguous()
    y = torch.empty((1, outputs))
    cpu.run(_kernel(), -(-outputs // PANEL), x.data_ptr(), *addresses, y.data_ptr(), x.shape[1], outputs, gelu)
    return y


@cache
def _kernel() -> Any:
    """Compiled at the first call, since not every processor has the instruction, and kept on disk."""

    @cfunc(cpu.SIGNATURE, cache=True)
    def kernel(arguments):
        a = carray(arguments, 10)
        inputs, outputs, gelu = a[7], a[8], a[9]
        x = carray(pointer(a[1], types.float32), inputs)
        scales, offsets = carray(pointer(a[3], types.float32), outputs), carray(pointer(a[4], types.float32), outputs)
        bias, y = carray(pointer(a[5], types.float32), outputs), carray(pointer(a[6], types.float32), outputs)
        levels, sums = np.empty(inputs, np.uint8), np.empty(PANEL, np.int32)
        scale, zero = quantize_row(x, np.float32(LEVELS), levels)  # by each thread for itself: sooner done than waited for
        while True:
            first = draw(arguments) * PANEL
            if first >= outputs:
                break
            multiply(a[2] + first * inputs, levels.ctypes.data, inputs // STEP, sums.ctypes.data)
            own = slice(first, min(first + PANEL, outputs))
            rescale(sums, scales[own], y[own])
            scale_row(y[own], scale, zero, offsets[own], bias[own], gelu)

    return kernel


@njit
def rescale(sums, scales, y):
    """As oneDNN ends its product. Without fast-math, which would fuse the multiplication with what follows."""
    for i in range(len(y)):
        y[i] = np.float32(sums[i]) * scales[i]


@intrinsic
def multiply(typingctx, weights, levels, steps, sums):
    """A panel of int8 at the address `weights` times uint8 `levels`, STEP of them in each of so many steps, to PANEL int32
    `sums`. In the compiler's own terms, since the sums have to stay in registers from step to step."""

    def generate(context, builder, signature, arguments):
        weights, levels, steps, sums = arguments
        vector = ir.VectorType(WORD, LANES)
        dot = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), DOT)
        zero, unset = ir.Constant(vector, [WORD(0)] * LANES), ir.Constant(vector, ir.Undefined)
        parts = range(0, PANEL * STEP, LANES * STEP)  # bytes
        totals = [cgutils.alloca_once_value(builder, zero) for _ in parts]
        with cgutils.for_range(builder, steps) as loop:
            four = builder.load(_at(builder, levels, loop.index, STEP, WORD), align=1)
            everywhere = builder.shuffle_vector(builder.insert_element(unset, four, WORD(0)), unset, zero)
            for part, total in zip(parts, totals, strict=True):
                fours = builder.load(_at(builder, weights, loop.index, PANEL * STEP, vector, part), align=1)
                builder.store(builder.call(dot, [builder.load(total), everywhere, fours]), total)
        for part, total in zip(parts, totals, strict=True):
            builder.store(builder.load(total), _at(builder, sums, LONG(0), 0, vector, part), align=1)
        return context.get_dummy_value()

    return types.void(weights, levels, steps, sums), generate


def _at(builder: Any, address: Any, index: Any, stride: int, kind: ir.Type, offset: int = 0) -> Any:
    """The place `index` strides and `offset` bytes behind the int64 `address`."""
    place = builder.add(address, builder.add(builder.mul(index, LONG(stride)), LONG(offset)))
    return builder.inttoptr(place, kind.as_pointer())
