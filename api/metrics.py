"""GET /metrics: what the engine has counted since it started, in the form that Prometheus reads.

Where vLLM has a name for the same thing it is used, so that dashboards made for vLLM show this server too; what only this
server has is called batchlab_... docs/metrics.md says what each means. Must not count anything: `batching/totals.py` does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Any

from flask import Blueprint, Response, current_app
from prometheus_client import PROCESS_COLLECTOR
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from api.errors import STATUS
from batching.loop import BatchingLoop
from batching.policies import POLICIES
from batching.policy import Limits
from batching.totals import CLASSES, Histogram, Totals
from jobs.store import Store

FINISH_REASONS = ("length", "stop")
BATCH_SIZES = tuple(2**n for n in range(13))  # up to the largest --max-batch-size

COUNTERS = (  # the last word, _total, is added where they are written out
    ("vllm:num_preemptions", "preemptions", "Times that a request lost its seat, to run again later."),
    ("vllm:prompt_tokens", "prompt_tokens", "Prompt tokens of requests that have got their first token."),
    ("vllm:generation_tokens", "output_tokens", "Tokens generated."),
    ("vllm:prefix_cache_queries", "prefix_cache_queries", "Tokens of new requests that were looked up in the prefix cache."),
    ("vllm:prefix_cache_hits", "prefix_cache_hits", "Of these, the tokens that it held."),
    ("batchlab_steps", "steps", "Steps (iterations) of the engine."),
    ("batchlab_busy_seconds", "busy_s", "Time during which a step was computed."),
    ("batchlab_computed_tokens", "computed_tokens", "Tokens computed: prompts, decodes, and what is computed again."),
    ("batchlab_recomputed_tokens", "recomputed_tokens", "Tokens computed again after a preemption."),
    (
        "batchlab_padding_tokens",
        "padding_tokens",
        "Padding computed beside them, as a static batch's rectangle: the padding share is this / (this + computed tokens).",
    ),
    ("batchlab_graph_padding_rows", "graph_padding_rows", "Rows added to fill up a CUDA graph."),
    ("batchlab_promotions", "promotions", "Deferred requests that became immediate, so as not to starve or be late."),
)
SERVER_TTFT = (
    "From a request's arrival at the server to its first token computed: less than a client's TTFT, by HTTP and sending."
)
TPOT = "Time per output token after the first, from a request's first token to its last."
HISTOGRAMS = (  # by priority
    ("vllm:time_to_first_token_seconds", "first_token", SERVER_TTFT),
    ("vllm:inter_token_latency_seconds", "between_tokens", "Between a token computed and the one before, for every token."),
    ("vllm:time_per_output_token_seconds", "between_tokens", "The same, by the name that it had in vLLM until 0.11."),
    ("vllm:request_time_per_output_token_seconds", "per_output_token", TPOT),
    ("vllm:e2e_request_latency_seconds", "latency", "From a request's arrival at the server to its answer."),
    ("vllm:request_queue_time_seconds", "queue", "From a request's arrival to its first step."),
    ("vllm:request_prefill_time_seconds", "prefill", "From a request's first step to its first token."),
    ("vllm:request_decode_time_seconds", "decode", "From a request's first token to its last."),
    ("vllm:request_prompt_tokens", "prompt_tokens", "Prompt tokens of a request."),
    ("vllm:request_generation_tokens", "output_tokens", "Tokens generated for a request."),
    ("vllm:request_params_max_tokens", "max_tokens", "Tokens that a request asked for at most."),
    ("vllm:request_inference_time_seconds", "inference", "From a request's first step to its last token."),
    ("vllm:request_max_num_generation_tokens", "longest", "Tokens generated for the longest of a prompt's n choices."),
    ("vllm:request_params_n", "choices", "Choices asked for, of a prompt."),
)
GAUGES = (
    ("vllm:num_requests_running", "running", "Requests that hold a sequence slot."),
    ("vllm:num_requests_waiting", "queue_depth", "Requests that wait for one."),
    ("vllm:kv_cache_usage_perc", "kv_use", "Share of the KV blocks in use, 0 to 1."),
    ("batchlab_kv_blocks", "kv_blocks", "KV blocks there are."),
)

Values = Mapping[Any, float]  # by the values of the labels, a tuple

blueprint = Blueprint("metrics", __name__)


@blueprint.get("/metrics")
def metrics() -> Response:
    """In the plain text format whatever `Accept` prefers: as OpenMetrics, prometheus-client writes vllm_ for vllm:."""
    loop: BatchingLoop = current_app.extensions["batching"]
    store: Store = current_app.extensions["store"]
    totals, state, engine = loop.totals(), loop.state(), loop.engine
    assert engine is not None  # or there would be no totals
    unfinished = len(store.unfinished())
    snapshot = Snapshot(engine.served_names[0], totals, state, loop.mode, engine.limits, unfinished)
    return Response(generate_latest(snapshot), content_type=CONTENT_TYPE_PLAIN_0_0_4)


@dataclass(frozen=True)
class Snapshot(Collector):
    """Everything at one moment, by its names. `state` and `mode`: as the batching loop tells them.

    A label's values are all there from the start, with 0: a rate can only be taken of what was there before.
    """

    model: str
    totals: Totals
    state: Mapping[str, Any]
    mode: Mapping[str, Any]
    limits: Limits
    unfinished_batches: int

    def collect(self) -> Iterator[Metric]:
        yield from self._counters()
        yield from self._histograms()
        yield from self._gauges()
        yield from PROCESS_COLLECTOR.collect()

    def _counters(self) -> Iterator[Metric]:
        counts = self.totals.counts
        for name, attribute, help in COUNTERS:
            yield self._counter(name, help, {(): getattr(counts, attribute)})
        finished = {(kind, reason): counts.finished[kind, reason] for kind in CLASSES for reason in FINISH_REASONS}
        yield self._counter(
            "vllm:request_success", "Requests finished, by what ended them.", finished, "priority", "finished_reason"
        )
        errors = {(code,): counts.errors[code] for code in (*STATUS, *counts.errors)}
        yield self._counter("batchlab_request_errors", "Requests not served, by the error's code.", errors, "code")

    def _histograms(self) -> Iterator[Metric]:
        for name, attribute, help in HISTOGRAMS:
            by_class: dict[str, Histogram] = getattr(self.totals.histograms, attribute)
            yield self._histogram(name, help, {(kind,): found for kind, found in by_class.items()}, "priority")
        step_tokens, sizes = self.totals.histograms.step_tokens, Histogram(BATCH_SIZES)
        for size, steps in self.totals.counts.batch_sizes.items():
            sizes.observe(size, steps)
        yield self._histogram("vllm:iteration_tokens_total", "Tokens computed in a step, padding left out.", {(): step_tokens})
        yield self._histogram("batchlab_batch_size", "Requests computed together in a step.", {(): sizes})

    def _gauges(self) -> Iterator[Metric]:
        for name, key, help in GAUGES:
            yield self._gauge(name, help, {(): self.state[key]})
        yield self._gauge("batchlab_sequence_slots", "Sequence slots there are.", {(): self.limits.max_batch_size})
        limit_ms = self.mode["params"].get("tbt_slo_ms") or self.state["tbt_slo_ms"]
        yield self._gauge(
            "batchlab_tbt_limit_seconds", "The limit on the time between tokens, for mixed.", {(): limit_ms / 1e3}
        )
        cache = {
            "block_size": self.limits.block_size,
            "num_gpu_blocks": self.limits.num_blocks,
            "enable_prefix_caching": self.limits.prefix_caching,
        }
        values = {tuple(map(str, cache.values())): 1.0}
        yield self._gauge("vllm:cache_config_info", "How the KV cache is laid out, in its labels; always 1.", values, *cache)
        in_force = self.mode["mode"]
        modes = {(name,): float(name == in_force) for name in (*POLICIES, in_force)}
        yield self._gauge("batchlab_mode", "1 for the mode in force, 0 for the others.", modes, "mode")
        batches = {(): self.unfinished_batches}
        yield self._gauge("batchlab_batches_unfinished", "Batches of /v1/batches that have not ended.", batches)

    # Each takes its values by their labels, to which the model's name is added, as vLLM has it.

    def _counter(self, name: str, help: str, values: Values, *labels: str) -> Metric:
        return self._filled(CounterMetricFamily(name, help, labels=("model_name", *labels)), values)

    def _gauge(self, name: str, help: str, values: Values, *labels: str) -> Metric:
        return self._filled(GaugeMetricFamily(name, help, labels=("model_name", *labels)), values)

    def _filled(
        self, family: CounterMetricFamily | GaugeMetricFamily, values: Values
    ) -> CounterMetricFamily | GaugeMetricFamily:
        for label_values, value in values.items():
            family.add_metric((self.model, *label_values), value)
        return family

    def _histogram(self, name: str, help: str, values: Mapping[Any, Histogram], *labels: str) -> Metric:
        family = HistogramMetricFamily(name, help, labels=("model_name", *labels))
        for label_values, histogram in values.items():
            bounds = map(floatToGoString, (*histogram.bounds, inf))
            at_most = accumulate(histogram.buckets)  # Prometheus counts all that lie under a bound
            family.add_metric((self.model, *label_values), list(zip(bounds, at_most, strict=True)), histogram.sum)
        return family
