"""One plan through one policy: engines in virtual time, a router where there are several, and what became of the requests. Must
not know of files or the command line.
"""

import json
from collections.abc import Callable
from functools import partial

from batching.policies import mode_of
from batching.policy import Policy
from batching.request import Request
from batching.step_log import KEPT, StepLog
from simulator.plans import ClosedLoop, Plan
from simulator.results import Results, Run, engine_figures
from simulator.routing import Router
from simulator.step_times import Model
from simulator.tables import KnownStepTime
from simulator.virtual import Replica, serve


def run(
    make_policy: Callable[[], Policy],
    model: Model,
    plan: Plan,
    *,
    replicas: int = 1,
    router: str = "round-robin",
    watched: bool = False,
) -> Run:
    """Serve the plan to its last request. With `watched` a single engine keeps the records of its newest steps. Raises
    PolicyFailed."""
    results = Results()
    coming = plan.arrivals()
    rule: Router | None = None

    def answered(place: int, req: Request) -> None:
        results.add(req)
        if rule:
            rule.answered(place, req)
        if isinstance(coming, ClosedLoop):
            coming.answered(req)

    limits, watched = model.limits, watched and replicas == 1
    log = StepLog(limits.max_batch_size) if watched else None
    engines = []
    for place in range(replicas):
        known = [KnownStepTime(table) for table in model.known]
        engines.append(Replica(make_policy(), limits, model.step_time, partial(answered, place), steps=log, known=known))
    probes = [] if model.known else model.probes()
    for engine in engines:
        for probe in probes:
            engine.driver.learn(probe)
    if replicas > 1:
        rule = Router(engines, router)
    serve(engines, coming, rule.route if rule else None)

    columns = results.columns()
    figures = engine_figures([engine.driver for engine in engines], columns.wall_s)
    steps = None
    if log:
        for engine in engines:
            engine.driver.steps.publish()
        steps = [record | {"end_s": record["end"]} for record in map(json.loads, log.read(0, KEPT)[1])]
    mode = mode_of(engines[0].driver.scheduler.policy)
    return Run(mode, columns, results.errors, figures, limits.max_batch_size if watched else 0, steps, limits.variants)
