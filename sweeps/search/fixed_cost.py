"""Width at fixed cost: configurations of a sweep that activate equally much.

More skills in a plan, or skills in more places, activate more parameters; a comparison at equal
cost gives each configuration the width at which its tasks activate, on average, as much as the
reference's.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Literal

from pipelines.config.run import FinetuneConfig
from skillnet_platform.errors import UserError
from sweeps.config.trials import FixedCostConfig

#: Widths beyond this are no answer.
MAX_WIDTH = 1 << 16


def compute_model_cost(
    config: FinetuneConfig, by: Literal["activated", "flops"] = "activated"
) -> float:
    """Mean over the evaluated tasks of activated parameters, or of FLOPs per example.

    The model is built without memory for its weights.
    """
    import torch

    from skillnet.accounting import account_task
    from skillnet.systems import build_system

    with torch.device("meta"):
        model = build_system(config.system, config.model, config.options)
    accounts = [account_task(model, task) for task in config.measured]
    return fmean(
        each.activated if by == "activated" else each.flops_per_example for each in accounts
    )


def fit_fixed_cost(config: FinetuneConfig, target: float, fixed: FixedCostConfig) -> FinetuneConfig:
    """The configuration with the width at which it costs ``target``.

    Raises:
        UserError: no width comes near enough; names the nearest ones.
    """
    if fixed.adjust is None:
        return config
    step = config.model.num_heads if fixed.adjust == "dim" else 1

    def with_width(count: int) -> FinetuneConfig:
        changes = {str(fixed.adjust): count * step}
        return replace(config, model=replace(config.model, **changes))  # type: ignore[arg-type]

    tried: dict[int, float] = {}

    def cost(count: int) -> float:
        if count not in tried:
            tried[count] = compute_model_cost(with_width(count), fixed.by)
        return tried[count]

    best = _find_nearest_count(cost, target, MAX_WIDTH // step)
    if abs(cost(best) - target) > fixed.tolerance * target:
        beside = ", ".join(
            f"{count * step} gives {tried[count]:,.0f}"
            for count in sorted(sorted(tried, key=lambda n: abs(tried[n] - target))[:2])
        )
        raise UserError(
            f"fixed_cost: no model.{fixed.adjust} comes within {100 * fixed.tolerance:g} % of "
            f"{target:,.0f}: {beside}; adjust the other width, or raise fixed_cost.tolerance"
        )
    return with_width(best)


def _find_nearest_count(cost: Callable[[int], float], target: float, most: int) -> int:
    """The count from 1 to ``most`` whose cost, which grows with it, is nearest to the target."""
    low, high = 1, 2
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
    """Where a straight line meets the target: exact for ``hidden``; kept inside the bracket."""
    rise = cost(high) - cost(low)
    share = (target - cost(low)) / rise if rise > 0 else 0.5
    guess = round(low + share * (high - low))
    return min(max(guess, low + 1), high - 1)
