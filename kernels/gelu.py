"""GELU (Hendrycks and Gimpel 2016) on a processor, in Numba, in its tanh approximation, as GPT-2 has it."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc

from kernels import cpu
from kernels.cpu import FAST, LOG2_E, STORED, compiled, draw, exp2, load, pointer, store

FACTOR = np.float32(2 * LOG2_E * (2 / np.pi) ** 0.5)


def gelu_(x: torch.Tensor) -> torch.Tensor:
    """x (T, N), contiguous, float32 or bfloat16, in place."""
    cpu.run(_kernel(STORED[x.dtype]), x.shape[0], x.data_ptr(), *x.shape)
    return x


@compiled
def gelu_of(x):
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x**3), as x / (1 + exp(-2 u))."""
    return x / (np.float32(1) + exp2(-FACTOR * x * (np.float32(1) + np.float32(0.044715) * x * x)))


@cache
def _kernel(stored: Any) -> Any:
    """Compiled for this dtype, and kept on disk from one start to the next."""

    @cfunc(cpu.SIGNATURE, cache=True, fastmath=FAST, error_model="numpy")
    def kernel(arguments):
        a = carray(arguments, 4)
        x = carray(pointer(a[1], stored), (a[2], a[3]))
        while True:
            token = draw(arguments)
            if token >= a[2]:
                break
            for i in range(a[3]):
                x[token, i] = store(gelu_of(load(x[token, i])), x)

    return kernel
