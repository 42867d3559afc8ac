"""Decode steps as CUDA graphs: the launches of a step recorded once, and then repeated with a single call.

A decode step of a small model is some three hundred kernels of a few microseconds each, and Python cannot launch them as fast
as a GPU runs them. A graph is launched as a whole. It always reads and writes the same memory and always has the same shapes,
so there is one for each of a few batch sizes (buckets); a step takes the next larger one, and rows are added to it that write
into a block of the cache that belongs to nobody. All buckets share their memory, since only one runs at a time.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from model.step_inputs import Shape, StepInputs

Forward = Callable[[StepInputs], torch.Tensor]
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def buckets(most: int) -> list[int]:
    """Batch sizes up to `most`, which is one of them: close together where a row more costs much of the step."""
    usual = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 64, 64)]
    return [size for size in usual if size < most] + [most]


class CudaCapture:
    """Records what a function launches, into memory that all recordings share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """What to call to repeat it. The function runs twice before, since kernels are compiled and libraries set up then."""
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            for _ in range(2):
                function()
        torch.cuda.current_stream(self._device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        self._pool = self._pool or graph.pool()
        return graph.replay


class DecodeGraphs:
    def __init__(self, forward: Forward, capture: Capture, device: torch.device, most: int, width: int, logits: int) -> None:
        """`forward`: from inputs to logits (R, `logits`), on the device alone. `most`: rows; `width`: blocks of a context."""
        self._sizes = buckets(most)
        self._width = width
        self._memory = torch.zeros(self.shape(most).nbytes, dtype=torch.uint8, device=device)
        self._logits = torch.empty((most, logits), device=device)
        self._replays = {}
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            inputs = StepInputs.within(self._memory, self.shape(size))

            def step(inputs: StepInputs = inputs, size: int = size) -> None:
                self._logits[:size].copy_(forward(inputs))

            self._replays[size] = capture(step)

    def bucket(self, rows: int) -> int:
        return self._sizes[bisect_left(self._sizes, rows)]

    def shape(self, size: int) -> Shape:
        """Of the inputs of a bucket."""
        return Shape(tokens=size, rows=size, width=self._width, drawn=size)

    def run(self, host: StepInputs, size: int) -> torch.Tensor:
        """Logits (size, vocabulary) of a step laid out in `self.shape(size)`; they are overwritten by the next."""
        self._memory[: len(host.memory)].copy_(host.memory, non_blocking=True)
        self._replays[size]()
        return self._logits[:size]
