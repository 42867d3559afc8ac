"""What this machine could do: how fast it reads memory, and how fast it multiplies by the model's matrices.

The matrix products of a step are a lower limit of the step's time that no scheduling and no attention can undercut. They are
measured twice: as torch's own `nn.Linear` and its dynamic 8-bit twin compute them ("library"), and with the weights laid out
as the engine has them ("laid out"). The limit is the faster of both.
"""

import time
import warnings
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from batching.scheduler import Scheduler
from batching.step import Step, StepResult
from benchmarks.workload import Job, serve
from model.device import DTYPES
from model.gpt import GPT

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
READ_BYTES = 1 << 28


def best(run: Callable[[], object], runs: int) -> float:
    """The shortest of so many times, in seconds; a GPU's work is waited for."""
    times = []
    for _ in range(runs):
        wait_for_gpu()
        started = time.perf_counter()
        run()
        wait_for_gpu()
        times.append(time.perf_counter() - started)
    return min(times)


def wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_bandwidth(device: torch.device, runs: int = 8) -> float:
    """Bytes a second when all cores read memory from end to end."""
    data = torch.ones(READ_BYTES // 4, device=device)
    return READ_BYTES / best(lambda: data.sum().item(), runs)


class Products:
    """The matrix products of one model in one dtype: seconds for any number of tokens and of rows to be sampled."""

    def __init__(self, model: GPT, dtype: str) -> None:
        """`model` as it is served: its laid out layers are used, the library's are made of random weights."""
        config = model.config
        self.activations = DTYPES.get(dtype, torch.float32)
        self.device = model.wte.weight.device
        blocks: list[Any] = list(model.h)  # all of them: of fewer, some would still lie in the processor's cache
        laid_out = [[block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj] for block in blocks]
        width = config.n_embd
        self.inputs = [width, width, width, 4 * width]
        outputs = [3 * width, width, 4 * width, width]
        library = [[_library(i, o, dtype).to(self.device) for i, o in zip(self.inputs, outputs, strict=True)] for _ in blocks]
        head = _library(width, config.vocab_size, dtype).to(self.device)
        self.kinds = {"library": (library, head), "laid out": (laid_out, model.lm_head)}
        self.layers: dict[str, dict[int, float]] = {kind: {} for kind in self.kinds}  # seconds of all layers by tokens
        self.heads: dict[str, dict[int, float]] = {kind: {} for kind in self.kinds}  # seconds of the head by rows

    @torch.inference_mode()
    def measure(self, runs: int = 2) -> None:
        """One more round over all batches; the shortest times are kept."""
        for tokens in BATCHES:
            x = self._random(tokens)
            for kind, (blocks, head) in self.kinds.items():
                seconds = best(partial(_call, self._with_inputs(blocks, x)), runs)
                self.layers[kind][tokens] = min(seconds, self.layers[kind].get(tokens, seconds))
                seconds = best(partial(_call, [(head, x[self.inputs[0]])]), runs)
                self.heads[kind][tokens] = min(seconds, self.heads[kind].get(tokens, seconds))

    @torch.inference_mode()
    def replay(self, sizes: list[tuple[int, int]], kind: str) -> float:
        """Seconds that the products of these steps take, one after the other; (tokens, rows to be sampled) of each."""
        blocks, head = self.kinds[kind]
        most = max(max(size) for size in sizes)
        inputs = self._random(most)
        wait_for_gpu()
        started = time.perf_counter()
        for tokens, rows in sizes:
            x = {width: values[:tokens] for width, values in inputs.items()}
            _call(self._with_inputs(blocks, x))
            head(inputs[self.inputs[0]][:rows])
        wait_for_gpu()
        return time.perf_counter() - started

    def _random(self, tokens: int) -> dict[int, torch.Tensor]:
        """What goes into the layers, by width."""
        return {width: torch.randn(tokens, width).to(self.device, self.activations) for width in set(self.inputs)}

    def _with_inputs(self, blocks: list[list[nn.Module]], x: dict[int, torch.Tensor]) -> list[tuple[nn.Module, torch.Tensor]]:
        """Each layer, and of `x`, which is by width, what goes into it."""
        return [(layer, x[width]) for block in blocks for layer, width in zip(block, self.inputs, strict=True)]

    def seconds(self, tokens: int, rows: int, kind: str | None = None) -> float:
        """The products of a step of so many tokens, `rows` of which are sampled; without `kind` by the faster of both."""
        if kind is None:
            return min(self.seconds(tokens, rows, kind) for kind in self.kinds)
        return _between(self.layers[kind], tokens) + _between(self.heads[kind], rows)


def _call(layers: list[tuple[nn.Module, torch.Tensor]]) -> None:
    for layer, x in layers:
        layer(x)


def _library(inputs: int, outputs: int, dtype: str) -> nn.Module:
    layer = nn.Sequential(nn.Linear(inputs, outputs).requires_grad_(False))
    if dtype != "int8":
        return layer.to(DTYPES[dtype])
    with warnings.catch_warnings():  # that this part of torch will move elsewhere
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)


def _between(times: dict[int, float], size: int) -> float:
    """Linear between the sizes that were measured, and beyond the largest in proportion to it."""
    if not size:
        return 0.0
    sizes = sorted(times)
    if size >= sizes[-1]:
        return times[sizes[-1]] * size / sizes[-1]
    above = sizes[bisect_left(sizes, size)]
    if above == sizes[0]:
        return times[above]
    below = sizes[sizes.index(above) - 1]
    part = (size - below) / (above - below)
    return times[below] + part * (times[above] - times[below])


class FreeExecutor:
    """Answers every step at once with some token, and remembers how large it was."""

    depth = 1

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []  # tokens, rows that are sampled

    def submit(self, step: Step) -> None:
        self._step = step

    def collect(self) -> StepResult:
        step = self._step
        tokens = {row.req.id: 1 for row in step.rows if row.samples}
        self.sizes.append((step.num_tokens + step.num_padding, len(tokens)))
        return StepResult(step.id, 0.0, 0.0, tokens)


def step_sizes(scheduler: Scheduler, jobs: list[Job]) -> list[tuple[int, int]]:
    """Tokens and sampled rows of each step in which the scheduler serves `jobs`, all there at the start."""
    executor = FreeExecutor()
    serve(scheduler, executor, jobs, lambda: 0.0)
    return executor.sizes
