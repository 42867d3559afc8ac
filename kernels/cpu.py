"""What the processor's kernels share: the threads they run on, which are those of torch's own operators, and arithmetic that
Numba has no word for.

Numba's `prange` would bring a second pool of threads. Both pools wait by spinning, so that on a laptop's few cores each would
steal the other's time; one team for both is why this file exists. torch's OpenMP library is in the process already, and
`GOMP_parallel` is the entry point that every `#pragma omp parallel` compiles to (libgomp has it, and LLVM's libomp too).

A kernel is a Numba `cfunc` that takes the address of an array of int64: the first is a counter from which each thread draws
its next piece of work, the others are addresses and sizes.
"""

import ctypes
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

LOG2_E = np.float32(1.4426950408889634)
EXP2 = tuple(np.float32(c) for c in (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
                                     2.402264791363012e-1, 6.931472028550421e-1, 1.0))  # fmt: skip
STORED = {torch.float32: types.float32, torch.bfloat16: types.uint16}  # how Numba sees them: bfloat16 as its bits
FAST = {"contract", "reassoc", "arcp", "nsz"}  # sums may be reordered; NaN stays NaN
# Python's error model would test for division by 0, which keeps a loop from being vector code.
compiled = partial(njit, fastmath=FAST, error_model="numpy")
SIGNATURE = types.void(types.CPointer(types.int64))
POINTER = ctypes.POINTER(ctypes.c_int64)


def run(kernel: Any, pieces: int, *arguments: int) -> None:
    """Run `kernel`, a cfunc of SIGNATURE, over so many pieces of work on torch's threads, and wait for it."""
    data = array("q", (0, *arguments))
    address, _ = data.buffer_info()
    if pieces > 1 and _parallel:
        _parallel(kernel.address, address, torch.get_num_threads(), 0)
    else:  # of a smaller team OpenMP would dismiss threads, and the next operator would hire them again
        kernel.ctypes(ctypes.cast(address, POINTER))


def _find_parallel() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel` of the OpenMP library that torch has loaded: a name that is loaded is not looked for again."""
    for library in ("libgomp.so.1", str(Path(torch.__file__).parent / "lib" / "libomp.dylib")):
        try:
            function = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


_parallel = _find_parallel()


@intrinsic
def draw(typingctx, counter):
    """The number in `counter` (a pointer to int64), which is one more for whoever asks next."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def announce(typingctx, counter):
    """One more in `counter` (a pointer to int64), for those who wait for it; they see what was written before."""

    def generate(context, builder, signature, arguments):
        builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "release")
        return context.get_dummy_value()

    return types.void(counter), generate


@njit
def wait_for(counter, number):
    """Until so many have been announced: it takes microseconds, for which no thread would be put to sleep."""
    while announced(counter) < number:
        pass


@intrinsic
def announced(typingctx, counter):
    def generate(context, builder, signature, arguments):
        return builder.load_atomic(arguments[0], "acquire", 8)

    return types.int64(counter), generate


@intrinsic
def pointer(typingctx, address, dtype):
    """The int64 `address` as a pointer to `dtype`."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(address, dtype), generate


@intrinsic
def call(typingctx, address, arguments):
    """Call the kernel at the int64 `address`: the very same code, bit for bit, where a function that both use would be compiled
    into each, and the order in which the compiler adds up differs from one place to the next."""

    def generate(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [values[1].type])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), [values[1]])
        return context.get_dummy_value()

    return types.void(address, arguments), generate


@intrinsic
def bits(typingctx, value):
    """The 32 bits of a float32, as an int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def float_of(typingctx, value):
    """The float32 that has these 32 bits (an int32)."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at the int64 `address`."""

    def generate(context, builder, signature, arguments):
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(function, [builder.inttoptr(arguments[0], byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@compiled
def exp2(x):
    """2**x to a few units in the last place of float32, x brought into [-126, 126]; a polynomial, so that a loop over it
    becomes vector code."""
    x = min(max(x, np.float32(-126)), np.float32(126))
    whole = np.floor(x + np.float32(0.5))
    part = x - whole  # in [-0.5, 0.5)
    value = EXP2[0]
    for c in EXP2[1:]:
        value = value * part + c
    return float_of(bits(value) + (np.int32(whole) << np.int32(23)))


def load(stored: Any) -> Any:
    """A stored number as float32."""
    raise NotImplementedError


@overload(load, inline="always")
def _load(stored):
    if stored == types.float32:
        return lambda stored: stored
    if stored == types.uint16:
        return lambda stored: float_of(np.int32(stored) << np.int32(16))
    raise TypingError(f"{stored} is not a dtype of this kernel")


def store(value: Any, array: Any) -> Any:
    """A float32 as `array` stores it, rounded to the nearest, ties to even."""
    raise NotImplementedError


@overload(store, inline="always")
def _store(value, array):
    if array.dtype == types.float32:
        return lambda value, array: value

    def rounded(value, array):
        pattern = np.uint32(bits(value))
        return np.uint16((pattern + np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded
