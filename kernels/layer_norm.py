"""Layer normalization (Ba et al. 2016) on a processor, in Numba, token by token."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc

from kernels import cpu
from kernels.cpu import STORED, compiled, draw, float_of, load, pointer, store


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x (T, C) with mean 0 and variance 1 in every row, times `weight` plus `bias`, (C,) of x's dtype: float32 or bfloat16."""
    x = x.contiguous()
    tokens, width = x.shape
    y = torch.empty_like(x)
    cpu.run(kernel_for(x.dtype), tokens, *(t.data_ptr() for t in (x, weight, bias, y)), tokens, width, as_bits(epsilon))
    return y


def as_bits(value: float) -> int:
    """As float32 among a kernel's integers."""
    return int(np.float32(value).view(np.int32))


def kernel_for(dtype: torch.dtype) -> Any:
    """The cfunc for activations of this dtype."""
    return _kernel(STORED[dtype])


@compiled
def normalize(x, weight, bias, epsilon, y):
    """One token; `epsilon` by its bits."""
    total = np.float32(0)
    for i in range(len(x)):
        total += load(x[i])
    mean = total / np.float32(len(x))
    squares = np.float32(0)
    for i in range(len(x)):
        squares += (load(x[i]) - mean) * (load(x[i]) - mean)
    factor = np.float32(1) / np.sqrt(squares / np.float32(len(x)) + float_of(np.int32(epsilon)))
    for i in range(len(x)):
        y[i] = store((load(x[i]) - mean) * factor * load(weight[i]) + load(bias[i]), y)


@cache
def _kernel(stored: Any) -> Any:
    """Compiled for this dtype, and kept on disk from one start to the next."""

    @cfunc(cpu.SIGNATURE, cache=True)
    def kernel(arguments):
        a = carray(arguments, 8)
        tokens, width, epsilon = a[5], a[6], a[7]
        x, y = carray(pointer(a[1], stored), (tokens, width)), carray(pointer(a[4], stored), (tokens, width))
        weight, bias = carray(pointer(a[2], stored), width), carray(pointer(a[3], stored), width)
        while True:
            token = draw(arguments)
            if token >= tokens:
                break
            normalize(x[token], weight, bias, epsilon, y[token])

    return kernel
