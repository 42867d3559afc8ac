"""Is the simulator right? The same requests on a real engine and in virtual time: how far single steps are from the law, and
the figures of the runs from each other; and the plans of the real runs, made again from their input logs.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from batching.policy import Policy
from batching.step_time import Probe
from client.shared.figures import LATENCIES, distribution
from client.shared.tables import text
from simulator.calibrate import LogError, Logged, make_again, make_steps
from simulator.plans import Plan
from simulator.results import Columns, Results
from simulator.simulation import run
from simulator.step_times import Errors, Linear, Model, Uneven, errors, fit
from simulator.virtual import StepTimeOf

if TYPE_CHECKING:
    from simulator.real import RealEngine

BOUNDS = {"throughput": 0.05, "p50": 0.05, "p90": 0.10, "p99": 0.10}
OF_SPREAD = 1.5  # a bound is at least so many times what the real runs are apart
UNEVEN = 0.2  # real runs that are farther apart say nothing where only their spread makes the bound
COMPARED = ("ttft", "tpot", "e2el")
SINCE_RESET = ("first_step", "padding_share")  # of a step's record: no input log tells of a reset
Figures = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A figure of each real run and the mean of the simulated ones, in seconds or requests and tokens a second."""

    name: str
    real: tuple[float, ...]
    simulated: float
    least_bound: float  # of the error, before the spread is looked at

    @property
    def mean(self) -> float:
        return mean(self.real)

    @property
    def error(self) -> float:
        """Signed, as a share of the real runs' mean."""
        return self.simulated / self.mean - 1

    @property
    def spread(self) -> float:
        """How far the real runs are apart, as a share of their mean."""
        return (max(self.real) - min(self.real)) / self.mean

    @property
    def bound(self) -> float:
        """Of the error, as it is applied."""
        return max(self.least_bound, OF_SPREAD * self.spread)

    @property
    def within(self) -> bool:
        return abs(self.error) <= self.bound

    @property
    def verdict(self) -> str:
        if not self.within:
            return "APART"
        return "too uneven" if abs(self.error) > self.least_bound and self.spread > UNEVEN else "ok"


@dataclass(frozen=True)
class Validation:
    """`step_errors`: of the law against the steps of each real run. `steps`: how many plans of each came out of its input log;
    `differ`: in how many runs those were not the plans that were made, None where that is not known here."""

    rows: tuple[Row, ...]
    step_errors: tuple[Errors, ...]
    steps: tuple[int, ...]
    differ: int | None = None

    @property
    def good(self) -> bool:
        return all(row.within for row in self.rows) and not self.differ

    def text(self) -> str:
        """The table, and what is to be said beside it."""
        real = (f"real {i}" for i in range(1, len(self.rows[0].real) + 1))
        lines = [["", *real, "simulated", "error", "spread", "bound", ""]]
        for row in self.rows:
            numbers = [f"{value:.4g}" for value in (*row.real, row.simulated)]
            shares = [f"{row.error:+.1%}", f"{row.spread:.1%}", f"{row.bound:.1%}"]
            lines.append([row.name, *numbers, *shares, row.verdict])
        told = zip(self.steps, self.step_errors, strict=True)
        said = [f"run {i}: {steps} steps; the law is {apart}" for i, (steps, apart) in enumerate(told, 1)]
        if self.differ:
            said.append(f"in {self.differ} runs the plans that the input log gives are NOT those that were made")
        elif self.differ == 0:
            said.append("the plans of all real runs, made again from their input logs, are the same step by step")
        return text(lines) + "\n\n" + "\n".join(said)

    def everything(self) -> dict[str, Any]:
        """JSON-ready."""
        derived = ("error", "spread", "bound", "within", "verdict")
        shown = [vars(row) | {name: getattr(row, name) for name in derived} for row in self.rows]
        step_errors = [one._asdict() for one in self.step_errors]
        return {"figures": shown, "steps": self.steps, "plans_differ": self.differ, "step_errors": step_errors}


def on_engine(
    engine: "RealEngine",
    make_policy: Callable[[], Policy],
    plan: Plan,
    runs: int,
    law: Linear | None,
    told: Callable[[str], None],
) -> tuple[Validation, Linear]:
    """`runs` real runs of the plan beside simulated ones. Without a `law` it is fitted to steps made before each of them and
    after the last, since a machine's speed changes from minute to minute; and there is a simulated run with the unevenness of
    each time that steps were made."""
    calibrations: list[list[Probe]] = []
    figures, measured, counts, differ = [], [], [], 0

    def calibrate() -> None:
        if law is None:
            told(f"calibrating, {len(calibrations) + 1} of {runs + 1}")
            calibrations.append(make_steps(engine, len(calibrations), lambda line: None))

    calibrate()
    for number in range(runs):
        told(f"real run {number + 1} of {runs}")
        results = Results()
        real = engine.serve(make_policy(), plan, results.add)
        figures.append(_figures(results.columns()))
        logged = make_again(real.log)
        measured.append(logged.seconds)
        counts.append(len(real.plans))
        differ += logged.plans != real.plans
        calibrate()
    law = law or fit([step for calibration in calibrations for step in calibration])
    engines: list[StepTimeOf] = [Uneven(law, calibration) for calibration in calibrations] or [law]
    simulated = [_figures(run(make_policy, Model(one, engine.limits, engine.about), plan).columns) for one in engines]
    step_errors = tuple(errors(law, steps) for steps in measured)
    return Validation(_rows(figures, simulated), step_errors, tuple(counts), differ), law


def on_log(logged: Logged, make_policy: Callable[[], Policy], law: Linear) -> Validation:
    """A server's run beside a simulated one."""
    results = Results()
    for index, req in enumerate(logged.answered):
        req.id = str(index)
        results.add(req)
    real = _figures(results.columns(logged.begun))
    simulated = _figures(run(make_policy, Model(law, logged.limits, ""), logged.plan()).columns)
    return Validation(_rows([real], [simulated]), (errors(law, logged.seconds),), (len(logged.plans),))


def same_records(logged: Logged, records: Sequence[dict[str, Any]]) -> int:
    """How many of a server's step records the plans made again have too; raises ValueError at the first that differs. Compared
    is what was planned and when it ended, in the server's own words; not what counts from a reset of its statistics on."""
    again = {record["id"]: record for record in map(json.loads, logged.steps.read(0, 10**9)[1])}
    shared = [record for record in records if record["id"] in again]
    for record in shared:
        if _planned(again[record["id"]]) != _planned(record):
            raise ValueError(f"step {record['id']} differs: {record} on the server, {again[record['id']]} made again")
    return len(shared)


def _planned(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in SINCE_RESET}


def _figures(columns: Columns) -> Figures:
    wall_s = columns.wall_s or float("nan")
    found = {"requests/s": len(columns.output) / wall_s, "output tokens/s": float(columns.output.sum()) / wall_s}
    for name in COMPARED:
        values = distribution(columns.values(name))
        found |= {f"{LATENCIES[name]} {s}, s": value for s in ("p50", "p90", "p99") if (value := values[s]) is not None}
    return found


def _rows(real: Sequence[Figures], simulated: Sequence[Figures]) -> tuple[Row, ...]:
    shared = [name for name in simulated[0] if all(name in figures for figures in (*real, *simulated))]
    if not any(name.startswith("E2EL") for name in shared):
        raise LogError("no request was served: there is nothing to compare")
    kinds = {name: next((s for s in BOUNDS if s in name), "throughput") for name in shared}
    return tuple(
        Row(name, tuple(f[name] for f in real), mean(f[name] for f in simulated), BOUNDS[kinds[name]]) for name in shared
    )
