"""Runs a step on the model: flattens its rows into one ragged batch, computes, samples. It keeps the KV cache; which block
belongs to whom it is told by the scheduler.

On a GPU two steps are under way: while the device computes one, the host takes in the one before and plans and launches the
next. A request's next input token is then not yet known to the host, so it is handed on from step to step on the device, and
comes to the host behind. On a CPU a step is computed when it is submitted.

Padding is really computed: a static batch's padding columns and the finished rows that keep their seats go through every
layer, their K and V to slots of the same row that real tokens will overwrite.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

from batching.request import Logprob, Request
from batching.step import Row, Step, StepResult
from model.cuda_graphs import Capture, DecodeGraphs
from model.gpt import GPT
from model.kv_cache import KVCache
from model.logprobs import Scores
from model.penalties import Past
from model.sampling import sample
from model.step_inputs import Shape, StepInputs

FEW_TOKENS, ROUND_TO = 64, 8  # on a CPU steps of more tokens than these are rounded up: see `_rounded`
SCORED_AT_ONCE = 256  # tokens of prompts whose logits are in memory together


@dataclass
class UnderWay:
    """A step that was launched. `drawn`: the tokens for `rows`, on the host once `ended`."""

    step: Step
    started: float
    began: torch.cuda.Event | None
    ended: torch.cuda.Event | None = None
    rows: list[Row] = field(default_factory=list)
    drawn: torch.Tensor | None = None
    scores: Scores | None = None
    error: Exception | None = None
    graph_padding: int = 0


class GPTExecutor:
    def __init__(
        self, model: GPT, cache: KVCache, vocab_size: int, clock: Callable[[], float], max_batch_size: int, depth: int = 1
    ) -> None:
        """`vocab_size`: the tokenizer's; ids beyond it are never drawn. `depth`: steps that may be under way, 1 or 2."""
        self.depth = depth
        self._model = model
        self._cache = cache
        self._vocab_size = vocab_size
        self._clock = clock
        self._max_batch_size = max_batch_size
        self._graphs: DecodeGraphs | None = None
        self._under_way: deque[UnderWay] = deque()
        self._drawn = torch.zeros(max_batch_size, dtype=torch.int64, device=cache.device)  # in the last step that was launched
        self._places: dict[str, int] = {}  # and for whom, by request id

    def warm_up(self) -> None:
        """Compute a token, and two at once, into block 0, so that the kernels of both are compiled before the first request.
        Raises what goes wrong."""
        req = Request("warm-up", [0, 0], 1)
        req.blocks.append(0)
        for count in (1, 2):
            self._launch((Row(req, 0, count, 0, 0, True),))

    @torch.inference_mode()
    def capture(self, how: Capture) -> None:
        """Make graphs of the decode steps. The cache must have a block that the scheduler does not know of: its last."""
        config = self._model.config
        width = -(-config.block_size // self._cache.block_size)
        sizes = (self._max_batch_size, width, self._vocab_size)
        self._graphs = DecodeGraphs(self._forward, how, self._cache.device, *sizes)

    def submit(self, step: Step) -> None:
        launched = UnderWay(step, self._clock(), self._mark())
        try:
            launched.rows, launched.drawn, launched.scores, launched.graph_padding = self._launch(step.rows)
        except Exception as failure:  # the requests of this step are told; the server goes on
            launched.error = failure
            self._places = {}
        launched.ended = self._mark()
        self._under_way.append(launched)

    def collect(self) -> StepResult:
        if not self._under_way:
            raise RuntimeError("collect without a step under way")
        done = self._under_way.popleft()
        tokens: dict[str, int] = {}
        logprobs: dict[str, dict[int, Logprob]] = {}
        error, started = done.error, done.started
        try:
            if done.ended is not None:
                done.ended.synchronize()
            if done.drawn is not None:
                pairs = zip(done.rows, done.drawn.tolist(), strict=True)
                tokens = {row.req.id: token for row, token in pairs if row.samples}
            if done.scores is not None:
                logprobs = done.scores.read()
        except Exception as failure:  # what went wrong on the device shows here
            error = failure
        ended = self._clock()
        if done.began is not None and done.ended is not None and error is None:
            started = ended - done.began.elapsed_time(done.ended) / 1e3  # the device's own time
        return StepResult(done.step.id, started, ended, tokens, error, done.graph_padding, logprobs)

    def _mark(self) -> torch.cuda.Event | None:
        """A moment in the device's work."""
        if self._cache.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @torch.inference_mode()
    def _launch(self, rows: tuple[Row, ...]) -> tuple[list[Row], torch.Tensor, Scores | None, int]:
        """The rows for which a token is drawn, the tokens and log probabilities, on their way to the host, and how many rows
        only fill a graph."""
        drawn = [row for row in rows if _draws(row)]
        num_tokens = sum(row.count + row.pad for row in rows)
        graphs = self._graphs if num_tokens == len(rows) == len(drawn) else None
        if graphs:
            size = graphs.bucket(len(rows))
            logits = graphs.run(self._describe(rows, graphs.shape(size)), size)[: len(rows)]
            features = logits[:0]
        else:
            size = len(rows)
            looked_at = len(drawn) + sum(len(_scored(row)) for row in rows)
            size_in_tokens = _rounded(num_tokens) if self._cache.device.type == "cpu" else num_tokens
            shape = Shape(size_in_tokens, len(rows), max(len(row.req.blocks) for row in rows), looked_at)
            inputs = self._describe(rows, shape)
            if inputs.memory.device != self._cache.device:
                inputs = StepInputs.within(inputs.memory.to(self._cache.device, non_blocking=True), shape)
            features = self._features(inputs)
            logits, features = self._logits(features[: len(drawn)]), features[len(drawn) :]
        # A request may have tokens that are still under way: those before the drawn one are counted, not looked at.
        indices = [row.start + max(row.count, 1) - row.req.prompt_len for row in drawn]
        pasts = {place: self._past(row) for place, row in enumerate(drawn) if row.req.sampling.penalised}
        tokens = sample(logits, [row.req.sampling for row in drawn], indices, pasts, self._drawn)
        scores = self._score(rows, drawn, logits, tokens, features)
        if self.depth > 1:
            self._drawn[: len(drawn)].copy_(tokens)
            self._places = {row.req.id: place for place, row in enumerate(drawn) if row.samples}
        return drawn, tokens.to("cpu", non_blocking=True), scores, size - len(rows)

    def _score(
        self, rows: tuple[Row, ...], drawn: list[Row], logits: torch.Tensor, tokens: torch.Tensor, features: torch.Tensor
    ) -> Scores | None:
        """Of the drawn tokens whose requests want it, by their logits, then of the prompts' (`_scored`), by their features: so
        many logits at once would fill the memory."""
        wanted = [place for place, row in enumerate(drawn) if row.samples and row.req.num_logprobs is not None]
        owners = [(drawn[place].req, drawn[place].start + drawn[place].count) for place in wanted]
        prompts = [(row.req, column + 1) for row in rows for column in _scored(row)]
        if not owners and not prompts:
            return None
        known = torch.tensor([req.tokens[place] for req, place in prompts], dtype=torch.int64).to(logits.device)
        pairs = zip(features.split(SCORED_AT_ONCE), known.split(SCORED_AT_ONCE), strict=True) if prompts else ()
        slices = ((self._logits(some), following) for some, following in pairs)
        return Scores.of(chain([(logits[wanted], tokens[wanted])], slices), [*owners, *prompts])

    def _past(self, row: Row) -> Past:
        """The tokens before the one that is drawn after `row`."""
        req, end = row.req, row.start + max(row.count, 1)
        known = req.tokens[:end]
        return Past(known, req.prompt_len, self._places.get(req.id, -1) if len(known) < end else -1)

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        return self._logits(self._features(inputs))

    def _features(self, inputs: StepInputs) -> torch.Tensor:
        tokens = inputs.tokens
        if self.depth > 1:
            tokens = torch.where(inputs.places < 0, tokens, self._drawn[inputs.places.clamp(min=0)])
        return self._model.features(tokens, inputs.positions, self._cache, inputs.batch, inputs.sampled)

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        return self._model.logits(features)[:, : self._vocab_size]

    def _describe(self, rows: tuple[Row, ...], shape: Shape) -> StepInputs:
        """On the host, in memory that a GPU can read. In NumPy, so that no Python work grows with the context. Rows of `shape`
        beyond these have a token each, and belong to the cache's last block; tokens beyond the rows' belong to nobody."""
        pinned = self._cache.device.type == "cuda"
        inputs = StepInputs.within(torch.empty(shape.nbytes, dtype=torch.uint8, pin_memory=pinned), shape)
        batch, block_size = inputs.batch, self._cache.block_size
        num_rows, more = len(rows), shape.rows - len(rows)
        starts, begins, tables = batch.starts.numpy(), batch.begins.numpy(), batch.tables.numpy()
        starts[:num_rows] = [row.start for row in rows]
        starts[num_rows:] = 0
        batch.spans.numpy()[:] = [*(row.span for row in rows), *(0,) * more]
        begins[0] = 0
        np.cumsum([*(row.count + row.pad for row in rows), *(1,) * more], out=begins[1:])
        tables[:num_rows] = 0
        for row, table in zip(rows, tables, strict=False):
            table[: len(row.req.blocks)] = row.req.blocks
        tables[num_rows:] = self._cache.num_blocks - 1
        owner = np.repeat(np.arange(shape.rows), np.diff(begins))  # the row of each token
        columns = np.arange(len(owner)) - begins[owner] + starts[owner]
        slots, positions, places, tokens = (x.numpy() for x in (batch.slots, inputs.positions, inputs.places, inputs.tokens))
        slots[len(owner) :], positions[len(owner) :], places[:], tokens[:] = 0, 0, -1, 0
        slots[: len(owner)] = tables[owner, columns // block_size].astype(np.int64) * block_size + columns % block_size
        np.minimum(columns, self._model.config.block_size - 1, out=positions[: len(owner)])
        drawn, scored = [], []
        for row, begin in zip(rows, begins.tolist(), strict=False):
            known = row.req.tokens[row.start : row.start + row.count]
            tokens[begin : begin + len(known)] = known
            if len(known) < row.count:  # its last is still being drawn; if that failed, so will the request
                places[begin + len(known)] = self._places.get(row.req.id, -1)
            if _draws(row):
                drawn.append(begin + max(row.count, 1) - 1)
            scored += [begin + column - row.start for column in _scored(row)]
        inputs.sampled.numpy()[:] = [*drawn, *scored, *range(len(owner) - more, len(owner))]
        return inputs


def _rounded(tokens: int) -> int:
    """oneDNN compiles its products for each number of tokens: 1 to 5 ms in all, and it keeps the last thousand. Batches of
    decodes repeat their sizes, prompts do not."""
    return tokens if tokens <= FEW_TOKENS else -(-tokens // ROUND_TO) * ROUND_TO


def _draws(row: Row) -> bool:
    """Whether a token is drawn after the row's last one; that of a finished row, which keeps its seat, nobody looks at."""
    return row.samples or row.count == 0


def _scored(row: Row) -> range:
    """The columns of the row after which the prompt goes on with a token whose log probability is wanted."""
    if not row.req.prompt_logprobs:
        return range(0)
    return range(row.start, min(row.start + row.count, row.req.prompt_len - 1))
