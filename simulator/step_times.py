"""How long a step takes on an engine that is not there: a law fitted to a real engine's steps, a table by batch size, or the
roofline of a GPU. Knows steps and nothing else: no policies, no clocks. See `calibrate.py` for where a law's numbers come from.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batching.policy import Limits
from batching.probe_steps import probe_steps
from batching.step import Step
from batching.step_time import Load, Probe
from simulator.tables import CENG523, CENG523_COLUMNS, CENG523_VARIANTS, StepTimeTable, Table, ceng523
from simulator.virtual import StepTimeOf

FORMAT = 1  # of a model file
DATA = Path(__file__).with_name("data")
FEWEST = 10  # steps to fit a law to
HICCUP = 3.0  # a step that took longer than so many times what the law says is the machine's affair and not the step's


class ModelError(ValueError):
    """There is no such model, or its file will not do; the message is one line."""


@dataclass(frozen=True)
class Model:
    """An engine on paper: how long its steps take, and what it can hold. `known`: the tables of its variants, where policies
    need not learn them."""

    step_time: StepTimeOf
    limits: Limits
    about: str
    known: Sequence[Table] = ()

    def probes(self) -> list[Probe]:
        """What a real engine would have measured of itself before its first request: the same steps, one after another."""
        probes, now = [], 0.0
        for variant in range(len(self.limits.variants)):
            for step in probe_steps(self.limits, variant):
                seconds = self.step_time(replace(step, planned_at=now))
                probes.append(Probe(step.load, seconds, variant))
                now += seconds
        return probes


# ---- the kinds that are not tables


@dataclass(frozen=True)
class Linear:
    """`b0 + b1 * prefill tokens + b2 * decodes + b3 * sum(KV columns of the decodes) + b4 * sum(chunk * context)`, in seconds;
    the terms are those of `batching/step_time.py`. A step of one decode and nothing else may have a law of its own, `single`
    (seconds, and for each KV column), for an engine may run it through other kernels than a batch (`kernels/one_token.py`)."""

    coefficients: tuple[float, ...]
    single: tuple[float, ...] = ()

    def __call__(self, step: Step) -> float:
        return self.seconds(step.load)

    def seconds(self, load: Load) -> float:
        prefill, decodes, kv, products = load
        if self.single and _is_single(load):
            return self.single[0] + self.single[1] * kv
        b0, b1, b2, b3, b4 = self.coefficients
        return b0 + b1 * prefill + b2 * decodes + b3 * kv + b4 * products


class Uneven:
    """`law` on a machine that computes now faster and now slower, as it did in `steps`, over and over: a step that meets a
    stretch in which the machine did half of what the law says takes longer by as much, whatever its size. Steps must not
    overlap."""

    def __init__(self, law: Linear, steps: Sequence[Probe]) -> None:
        """`steps`: measured one after another."""
        self._law = law
        self._time = np.cumsum([0.0, *(step.seconds for step in steps)])
        self._work = np.cumsum([0.0, *(law.seconds(step.load) for step in steps)])  # done by then, in seconds of the law

    def __call__(self, step: Step) -> float:
        rounds, begin = divmod(step.planned_at, self._time[-1])
        done = np.interp(begin, self._time, self._work) + self._law(step)
        more, rest = divmod(done, self._work[-1])
        end = (rounds + more) * self._time[-1] + np.interp(rest, self._work, self._time)
        return float(end - step.planned_at)


def _is_single(load: Load) -> bool:
    return load.decodes == 1 and not load.prefill


class Gpu(NamedTuple):
    """Peak of dense 16-bit matrix products, FLOP/s, and of memory, bytes/s, as NVIDIA's data sheets have them."""

    flops: float
    bandwidth: float


GPUS = {
    "T4": Gpu(65e12, 320e9),
    "L4": Gpu(121e12, 300e9),
    "A100": Gpu(312e12, 2039e9),  # 80 GB, SXM
    "H100": Gpu(989e12, 3350e9),  # SXM
    "H200": Gpu(989e12, 4800e9),
}


class Shape(NamedTuple):
    """A GPT-2: layers, width, vocabulary."""

    layers: int
    width: int
    vocabulary: int = 50257


SHAPES = {
    "distilgpt2": Shape(6, 768),
    "gpt2": Shape(12, 768),
    "gpt2-medium": Shape(24, 1024),
    "gpt2-large": Shape(36, 1280),
    "gpt2-xl": Shape(48, 1600),
}
WORD = 2  # bytes of a weight or of a number in the KV cache


@dataclass(frozen=True)
class Roofline:
    """No step can be faster: all weights and the KV cache it attends to are read once, its arithmetic runs at the peak, and the
    slower of the two decides (Williams et al. 2009). No launches, no sampling, no host: a bound, not a forecast."""

    gpu: Gpu
    shape: Shape

    def __call__(self, step: Step) -> float:
        layers, width, vocabulary = self.shape
        columns = sum(max(row.start + row.count + row.pad, row.span) for row in step.rows)
        drawn = sum(row.samples for row in step.rows)
        load = step.load
        blocks = 12 * layers * width * width  # weights of the layers; those of the vocabulary make logits of drawn tokens only
        flops = 2 * blocks * (load.prefill + load.decodes) + 2 * vocabulary * width * drawn
        flops += 4 * layers * width * (load.kv + load.products)
        read = WORD * (blocks + vocabulary * width + 2 * layers * width * columns)
        return max(flops / self.gpu.flops, read / self.gpu.bandwidth)


# ---- fitting the law


def fit(steps: Sequence[Probe]) -> Linear:
    """The law with the least relative error and no negative term, scaled so that all steps but hiccups together take as long
    as they did. Raises ModelError."""
    if len(steps) < FEWEST:
        raise ModelError(f"a fit needs at least {FEWEST} steps, there are {len(steps)}")
    if not all(step.seconds > 0 for step in steps):
        raise ModelError("every step must have taken some time")
    single = [step for step in steps if _is_single(step.load)]
    others = [step for step in steps if not _is_single(step.load)]
    if min(len(single), len(others)) < FEWEST:  # too few to tell them apart
        single, others = [], list(steps)
    of_one = _least_error([(1.0, step.load.kv) for step in single], single) if single else ()
    return Linear(_least_error([(1.0, *step.load) for step in others], others), of_one)


def _least_error(rows: Sequence[tuple[float, ...]], steps: Sequence[Probe]) -> tuple[float, ...]:
    terms, seconds = np.array(rows), np.array([step.seconds for step in steps])
    law = _non_negative(terms / seconds[:, None], np.ones(len(seconds)))
    usual = seconds <= HICCUP * (terms @ law)
    law *= seconds[usual].sum() / (terms[usual] @ law).sum()
    return tuple(float(b) for b in law)


def _non_negative(terms: Any, targets: Any) -> Any:
    """Non-negative least squares: the best of the unconstrained solutions over each choice of terms that has no negative one.
    With five terms there are 31."""
    scale = np.linalg.norm(terms, axis=0)
    used = np.flatnonzero(scale)
    q, r = np.linalg.qr(terms[:, used] / scale[used])
    target = q.T @ targets
    best, least = np.zeros(terms.shape[1]), inf
    for count in range(1, len(used) + 1):
        for chosen in combinations(range(len(used)), count):
            found = np.linalg.lstsq(r[:, chosen], target, rcond=None)[0]
            error = float(np.linalg.norm(r[:, chosen] @ found - target))
            if found.min() >= 0 and error < least:
                best, least = np.zeros(terms.shape[1]), error
                best[used[list(chosen)]] = found / scale[used[list(chosen)]]
    return best


class Errors(NamedTuple):
    """Of a law against measured steps, as shares of what was measured: of the total, and of single steps at percentiles of
    their size."""

    total: float
    p50: float
    p90: float
    p99: float

    def __str__(self) -> str:
        return f"{self.total:+.1%} in all; single steps {self.p50:.1%} (p50), {self.p90:.1%} (p90), {self.p99:.1%} (p99)"


def errors(law: Linear, steps: Sequence[Probe]) -> Errors:
    seconds = np.array([step.seconds for step in steps])
    foretold = np.array([law.seconds(step.load) for step in steps])
    single = np.percentile(np.abs(foretold - seconds) / seconds, (50, 90, 99))
    return Errors(float(foretold.sum() / seconds.sum() - 1), *map(float, single))


# ---- files and names


def write_model(path: Path, law: Linear, limits: Limits, about: str) -> None:
    """Raises OSError."""
    numbers = {"coefficients_s": law.coefficients, "single_s": law.single}
    value = {"model": FORMAT, "kind": "linear", "about": about} | numbers | {"limits": asdict(limits)}
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def find_model(name: str) -> Model:
    """By a file (.json of `calibrate`, .csv of a table, `FILE:COLUMN` where it has several), by the name of one in
    simulator/data (`ceng523`: three variants of a model), or as `GPU:SHAPE` for a roofline. Raises ModelError."""
    first, _, second = name.partition(":")
    if first in GPUS:
        if second not in SHAPES:
            raise ModelError(f"--model {name}: {first} needs a shape, as in {first}:gpt2-medium; there are {', '.join(SHAPES)}")
        about = f"the roofline of {second}, 16 bits, on one {first}"
        return Model(Roofline(GPUS[first], SHAPES[second]), Limits(max_batch_size=256, num_blocks=16384), about)
    for path in (Path(first), DATA / first, DATA / f"{first}.json", DATA / f"{first}.csv"):
        if path.is_file():
            if path.samefile(CENG523):
                return _ceng523(second)
            return _read_table(path, second) if path.suffix == ".csv" else _read_model(path)
    raise ModelError(f"--model {name}: there is no such file, and no such name; there are {', '.join(known_models())}")


def known_models() -> Iterable[str]:
    """What `find_model` knows by name."""
    return [
        *sorted(path.stem for path in DATA.glob("*") if path.suffix in (".json", ".csv")),
        *(f"{gpu}:SHAPE" for gpu in GPUS),
    ]


def _read_model(path: Path) -> Model:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from None
    if not isinstance(value, dict) or value.get("model") != FORMAT or value.get("kind") != "linear":
        raise ModelError(f'{path}: is no model: it must be an object with "model": {FORMAT} and "kind": "linear"')
    numbers = value.get("coefficients_s")
    if not (isinstance(numbers, list) and len(numbers) == 5 and all(map(_at_least_0, numbers)) and any(numbers)):
        raise ModelError(f"{path}: coefficients_s must be five numbers from 0 on, not all 0")
    single = value.get("single_s", [])
    if not (
        isinstance(single, list) and len(single) in (0, 2) and all(map(_at_least_0, single)) and any(single) == bool(single)
    ):
        raise ModelError(f"{path}: single_s must be two numbers from 0 on, not both 0, or none")
    known = {f.name for f in fields(Limits)}
    given = value.get("limits")
    if not isinstance(given, dict):
        raise ModelError(f"{path}: limits must be an object")
    if unknown := sorted(given.keys() - known):
        raise ModelError(f"{path}: limits has no {unknown[0]}; there are {', '.join(sorted(known))}")
    try:
        limits = Limits(**given)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: limits: {error}") from None
    if len(limits.variants) > 1:
        raise ModelError(f"{path}: limits: variants: one law is that of one variant, not of {len(limits.variants)}")
    law = Linear(tuple(float(b) for b in numbers), tuple(float(b) for b in single))
    return Model(law, limits, str(value.get("about") or path.stem))


def _at_least_0(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < inf


def _ceng523(column: str) -> Model:
    """All variants of the project, from which a policy may choose; or one of them alone."""
    if column and column not in CENG523_COLUMNS:
        raise ModelError(f"--model ceng523:{column}: there is no such variant; there are {', '.join(CENG523_COLUMNS)}")
    chosen = [place for place, name in enumerate(CENG523_COLUMNS) if column in ("", name)]
    tables, names = [ceng523()[place] for place in chosen], [CENG523_VARIANTS[place] for place in chosen]
    limits = Limits(max_batch_size=tables[0].largest, variants=names)
    about = f"ceng523: {', '.join(names)}; its requests have one prompt token and one to generate"
    return Model(StepTimeTable(tables), limits, about, tables)


def _read_table(path: Path, column: str) -> Model:
    """Batch size in the first column, milliseconds in the others. Lines that begin with # are comments."""
    try:
        with path.open(newline="\n", encoding="utf-8-sig") as file:
            rows = list(csv.reader(line for line in file if line.strip() and not line.startswith("#")))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ModelError(f"{path}: is not CSV in UTF-8: {error}") from None
    names = [name.strip() for name in rows[0][1:]] if rows else []
    if not names or (column or names[0]) not in names or (len(names) > 1 and not column):
        raise ModelError(
            f"{path}: say which column, as in {path.stem}:{names[0] if names else 'ms'}; there are {', '.join(names)}"
        )
    place = names.index(column or names[0]) + 1
    try:
        entries = sorted((int(row[0]), float(row[place])) for row in rows[1:])
    except (ValueError, IndexError):
        raise ModelError(f"{path}: every line must have a batch size and, in column {names[place - 1]}, a number") from None
    sizes = [size for size, _ in entries]
    if not entries or sizes[0] < 1 or len(set(sizes)) < len(sizes) or not all(0 < ms < inf for _, ms in entries):
        raise ModelError(f"{path}: batch sizes must be different whole numbers from 1 on, times more than 0")
    limits = Limits(max_batch_size=sizes[-1], token_budget=max(512, sizes[-1]))
    return Model(StepTimeTable([Table(dict(entries))]), limits, f"{path.stem}: {names[place - 1]}")
