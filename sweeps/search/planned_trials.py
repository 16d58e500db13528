"""Trials of a sweep for a plan of their memory, and the resources of one: :func:`request_sweep`."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from pipelines.training.config.resources import PlannedRun
from skillnet_platform.cluster.resource_request import ResourceRequest
from sweeps.config.resources import request_run
from sweeps.config.sweep import SweepConfig
from sweeps.search.fixed_cost import compute_model_cost, fit_fixed_cost
from sweeps.search.space import SearchPoint, SearchSpace, describe_point

#: Points of the search space that are compared.
MAX_POINTS = 64


def request_sweep(config: SweepConfig) -> ResourceRequest:
    """Return the resources of one trial of a sweep."""
    one = request_run(config, config.run.training)
    return replace(one, list_runs=lambda: list_sweep_runs(config))


def list_sweep_runs(config: SweepConfig) -> list[PlannedRun]:
    """Return the runs of the points that a sweep tries. Optuna's points are not known before.

    Args:
        config: settings of the sweep.

    Raises:
        UserError: the search space is invalid.
    """
    space, target = SearchSpace(config.space, config.run), 0.0
    points: Iterator[SearchPoint]
    if config.search == "grid":
        points = itertools.islice(space.grid_points(), MAX_POINTS)
    elif config.search == "random":
        points = itertools.islice(
            space.random_points(config.samples, config.search_seed), MAX_POINTS
        )
    else:
        count = min(config.samples, MAX_POINTS)
        points = iter(space.latin_hypercube_points(count, config.search_seed))
    if config.fixed_cost.adjust is not None:
        target = config.fixed_cost.target or compute_model_cost(config.run, config.fixed_cost.by)
    planned, share = [], config.resources.gpus or 1.0
    for point in points:
        run = fit_fixed_cost(space.apply_point(point), target, config.fixed_cost)
        planned.append(PlannedRun(run, describe_point(point), "run.", share))
    return planned
