"""Trials of a sweep for a plan of their memory, and the resources of one: :func:`request_sweep`."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import fmean
from typing import Literal

from pipelines.training.config.resources import PlannedRun
from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.errors import UserError
from sweeps.config.sweep import SweepConfig
from sweeps.config.trials import FixedCostConfig, request_run
from sweeps.search.space import SearchPoint, SearchSpace, describe_point

#: Largest width that is tried.
MAX_WIDTH = 1 << 16


def compute_model_cost(
    config: FinetuneConfig, by: Literal["activated", "flops"] = "activated"
) -> float:
    """Return the mean cost over the evaluated tasks.

    The model is built on the meta device, without memory for its weights.

    Args:
        config: the run.
        by: activated parameters, or FLOPs per example.
    """
    import torch

    from skillnet.accounting import account_task
    from skillnet.systems import build_system

    config = config.joint()
    # The meta device allocates no weights, so that many widths can be tried.
    with torch.device("meta"):
        model = build_system(config.system, config.model, config.options)
    accounts = [account_task(model, task) for task in config.measured]
    return fmean(
        each.activated if by == "activated" else each.flops_per_example for each in accounts
    )


def fit_fixed_cost(config: FinetuneConfig, target: float, fixed: FixedCostConfig) -> FinetuneConfig:
    """Return the configuration with the width at which it costs ``target``.

    Args:
        config: the run.
        target: activated parameters or FLOPs per example, mean over tasks.
        fixed: the width to set, and the tolerance.

    Raises:
        UserError: no width is within the tolerance; the message lists the nearest widths.
    """
    if fixed.adjust is None:
        return config
    # The model width must be a multiple of the number of heads.
    step = config.model.num_heads if fixed.adjust == "dim" else 1

    def with_width(count: int) -> FinetuneConfig:
        changes = {str(fixed.adjust): count * step}
        return replace(config, model=replace(config.model, **changes))  # type: ignore[arg-type]

    costs: dict[int, float] = {}

    def cost(count: int) -> float:
        # The search asks for the same width several times, and each costs a model.
        if count not in costs:
            costs[count] = compute_model_cost(with_width(count), fixed.by)
        return costs[count]

    best = _find_nearest_count(cost, target, MAX_WIDTH // step)
    # Outside of the tolerance, a better score could come from the cost alone.
    if abs(cost(best) - target) > fixed.tolerance * target:
        nearest = ", ".join(
            f"{count * step} gives {costs[count]:,.0f}"
            for count in sorted(sorted(costs, key=lambda n: abs(costs[n] - target))[:2])
        )
        raise UserError(
            f"fixed_cost: no model.{fixed.adjust} comes within {100 * fixed.tolerance:g} % of "
            f"{target:,.0f}: {nearest}; adjust the other width, or raise fixed_cost.tolerance"
        )
    return with_width(best)


def _find_nearest_count(cost: Callable[[int], float], target: float, most: int) -> int:
    """Return the count from 1 to ``most`` with the cost nearest to the target.

    The cost must increase with the count.
    """
    low, high = 1, 2
    # Doubling first finds a bracket, then interpolation needs few model builds.
    while high < most and cost(high) < target:
        low, high = high, min(high * 2, most)
    while high - low > 1:
        middle = _interpolate_count(cost, target, low, high)
        if cost(middle) < target:
            low = middle
        else:
            high = middle
    return min((low, high), key=lambda count: abs(cost(count) - target))


def _interpolate_count(cost: Callable[[int], float], target: float, low: int, high: int) -> int:
    """Return the linear interpolation inside (low, high); it is exact for ``ffn_dim``."""
    rise = cost(high) - cost(low)
    # Without a rise, halving still ends.
    fraction = (target - cost(low)) / rise if rise > 0 else 0.5
    guess = round(low + fraction * (high - low))
    return min(max(guess, low + 1), high - 1)


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
