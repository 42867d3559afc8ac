"""A linear layer for one token, read from the panels in which oneDNN packs weights: a walk over memory, as fast as it comes.

oneDNN keeps the weights (N, K) of a layer in panels of 64 outputs, and in a panel, for every four inputs (two in bfloat16), the
weights of each output. That is how AVX-512 multiplies: one instruction takes 16 outputs times four int8 inputs (VNNI) or two
bfloat16 inputs (BF16), and adds up in 32 bits. What belongs to the layer besides the product is done panel by panel too:
scaling, bias, GELU, and the addition to what the layer's output is added to.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from kernels.cpu import announce, compiled, draw, load, pointer, store, wait_for
from kernels.gelu import gelu_of
from kernels.quantize import LEVELS, quantize_row, scale_row

PANEL = 64  # outputs
LANES = 16  # outputs of one instruction
CHUNK = 512  # inputs in bfloat16 that oneDNN adds up before it adds them to the others; of more than two such, twice as many
BYTES = 4  # of inputs that one instruction multiplies and adds up: four int8 or two bfloat16
WORD, LONG = ir.IntType(32), ir.IntType(64)


class BFloat16Type(ir.Type):
    """What llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


@dataclass(frozen=True)
class Instruction:
    name: str
    feature: str  # of the processor
    operands: ir.Type  # in a vector
    sums: ir.Type


INT8 = Instruction("llvm.x86.avx512.vpdpbusd.512", "avx512vnni", ir.VectorType(WORD, LANES), WORD)
BF16 = Instruction("llvm.x86.avx512bf16.dpbf16ps.512", "avx512bf16", ir.VectorType(BFloat16Type(), 2 * LANES), ir.FloatType())


def can_read(packed: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `packed` has `weight` (N, K), int8 or bfloat16, in panels, and this processor the instruction for them."""
    instruction = INT8 if weight.dtype == torch.int8 else BF16
    outputs, inputs = weight.shape
    row, last = inputs * weight.element_size(), (outputs - 1) // PANEL
    if not llvm.get_host_cpu_features().get(instruction.feature) or row % BYTES or outputs < PANEL:
        return False
    if torch.ops.mkldnn._nbytes(packed) < (last + 1) * PANEL * row:
        return False
    for panel in (0, last):
        found = (ctypes.c_int8 * (PANEL * row)).from_address(torch.ops.mkldnn.data_ptr(packed) + panel * PANEL * row)
        expected = torch.zeros(PANEL, row, dtype=torch.int8)  # what is missing in the last one
        rows = weight[panel * PANEL : (panel + 1) * PANEL].contiguous().view(torch.int8)
        expected[: len(rows)] = rows
        if bytes(found) != expected.view(PANEL, -1, BYTES).transpose(0, 1).contiguous().numpy().tobytes():
            return False
    return True


@compiled
def layer(counters, x, a, gelu, residual, y):
    """The threads that call it share the panels of a layer; each returns when all of y (N,) is there. x: (K,) of y's dtype,
    which is float32 where the weights are int8, and bfloat16 where they are. `a`: the addresses of the weights and, (N,)
    float32 each, of an output's scale, of the sum of its scaled weights (both for int8) and of what is added. `residual` is
    added to y, unless it is empty. `counters`: the address of two numbers that are 0 at first."""
    outputs = len(y)
    factors, scale, zero = operand(x)  # by each thread for itself: sooner done than waited for
    scales, offsets = carray(pointer(a[1], types.float32), outputs), carray(pointer(a[2], types.float32), outputs)
    bias, sums = carray(pointer(a[3], types.float32), outputs), np.empty(PANEL, np.float32)
    size = PANEL * factors.nbytes
    panels = -(-outputs // PANEL)
    while True:
        panel = draw(pointer(counters, types.int64))
        if panel >= panels:
            break
        first = panel * PANEL
        own = slice(first, min(first + PANEL, outputs))
        multiply(a[0] + panel * size, factors, sums)
        finish(sums[: own.stop - first], scale, zero, scales[own], offsets[own], bias[own], gelu, y[own])
        if len(residual):
            add(residual[own], y[own])
        announce(pointer(counters + 8, types.int64))
    wait_for(pointer(counters + 8, types.int64), panels)


def operand(x: Any) -> Any:
    """x as the product's instruction takes it, and, where that is 8 bits, its scale and zero point."""
    raise NotImplementedError


@overload(operand)
def _operand(x):
    if x.dtype == types.uint16:
        return lambda x: (x, np.float32(1), np.float32(0))

    def quantized(x):
        levels = np.empty(len(x), np.uint8)
        scale, zero = quantize_row(x, np.float32(LEVELS), levels)
        return levels, scale, zero

    return quantized


def multiply(weights: Any, factors: Any, sums: Any) -> None:
    """The panel at the address `weights` times `factors` (K,), to PANEL sums: of float32, or of int32 as its bits."""
    raise NotImplementedError


@overload(multiply)
def _multiply(weights, factors, sums):
    if factors.dtype == types.uint16:

        def in_chunks(weights, factors, sums):
            chunk = CHUNK if len(factors) <= 2 * CHUNK else 2 * CHUNK
            part = np.empty_like(sums)
            sums[:] = 0
            for first in range(0, len(factors), chunk):
                some = factors[first : first + chunk]
                dot_bf16(weights + first * PANEL * 2, some.ctypes.data, len(some) // 2, part.ctypes.data)
                for i in range(PANEL):
                    sums[i] += part[i]

        return in_chunks
    return lambda weights, factors, sums: dot_int8(weights, factors.ctypes.data, factors.nbytes // BYTES, sums.ctypes.data)


def finish(sums: Any, scale: Any, zero: Any, scales: Any, offsets: Any, bias: Any, gelu: Any, y: Any) -> None:
    """From sums to outputs."""
    raise NotImplementedError


@overload(finish)
def _finish(sums, scale, zero, scales, offsets, bias, gelu, y):
    if y.dtype == types.uint16:

        def to_bf16(sums, scale, zero, scales, offsets, bias, gelu, y):
            for i in range(len(y)):
                y[i] = store(sums[i] + bias[i], y)
            if gelu:
                for i in range(len(y)):
                    y[i] = store(gelu_of(load(y[i])), y)

        return to_bf16

    def rescaled(sums, scale, zero, scales, offsets, bias, gelu, y):
        rescale(sums.view(np.int32), scales, y)
        scale_row(y, scale, zero, offsets, bias, gelu)

    return rescaled


@njit
def rescale(sums, scales, y):
    """As oneDNN ends its product. Without fast-math, which would fuse the multiplication with what follows."""
    for i in range(len(y)):
        y[i] = np.float32(sums[i]) * scales[i]


@njit
def add(residual, y):
    """Without fast-math, which would add in another order."""
    for i in range(len(y)):
        y[i] = store(load(residual[i]) + load(y[i]), y)


def _dot(instruction: Instruction) -> Any:
    """Numba's function for `instruction`: a panel at the address `weights` times the factors, BYTES of them in each of so many
    steps. In the compiler's own terms, since the sums have to stay in registers from step to step."""

    @intrinsic
    def dot(typingctx, weights, factors, steps, sums):
        def generate(context, builder, signature, arguments):
            weights, factors, steps, sums = arguments
            words, vector = ir.VectorType(WORD, LANES), ir.VectorType(instruction.sums, LANES)
            kind = ir.FunctionType(vector, [vector, instruction.operands, instruction.operands])
            function = cgutils.get_or_insert_function(builder.module, kind, instruction.name)
            nothing, unset = ir.Constant(vector, [instruction.sums(0)] * LANES), ir.Constant(words, ir.Undefined)
            lane = ir.Constant(words, [WORD(0)] * LANES)
            parts = range(0, PANEL * BYTES, LANES * BYTES)
            totals = [cgutils.alloca_once_value(builder, nothing) for _ in parts]
            with cgutils.for_range(builder, steps) as loop:
                few = builder.load(_at(builder, factors, loop.index, BYTES, WORD), align=1)
                everywhere = builder.shuffle_vector(builder.insert_element(unset, few, WORD(0)), unset, lane)
                for part, total in zip(parts, totals, strict=True):
                    several = builder.load(_at(builder, weights, loop.index, PANEL * BYTES, words, part), align=1)
                    pair = [builder.bitcast(value, instruction.operands) for value in (everywhere, several)]
                    builder.store(builder.call(function, [builder.load(total), *pair]), total)
            for part, total in zip(parts, totals, strict=True):
                builder.store(builder.load(total), _at(builder, sums, LONG(0), 0, vector, part), align=1)
            return context.get_dummy_value()

        return types.void(weights, factors, steps, sums), generate

    return dot


def _at(builder: Any, address: Any, index: Any, stride: int, kind: ir.Type, offset: int = 0) -> Any:
    """The place `index` strides and `offset` bytes behind the int64 `address`."""
    place = builder.add(address, builder.add(builder.mul(index, LONG(stride)), LONG(offset)))
    return builder.inttoptr(place, kind.as_pointer())


dot_int8, dot_bf16 = _dot(INT8), _dot(BF16)
