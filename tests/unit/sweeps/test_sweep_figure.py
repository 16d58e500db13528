"""The figure of a sweep: score against cost."""

from pathlib import Path

import pytest

from sweeps.search import ranking
from sweeps.trials.trial import TrialOutcome


def outcome(name: str, params: float, flops: float) -> TrialOutcome:
    line = {"step": 1, "score": 0.5, "scores": {}}
    costs = {"activated_params": params, "flops_per_example": flops}
    return TrialOutcome(name, name, Path(), "finished", reports=[line | costs])


def test_nearly_equal_costs_do_not_fill_the_axis() -> None:
    ranked = ranking.rank_configurations([outcome("a", 2.000e6, 1e8), outcome("b", 2.001e6, 2e8)])
    figure = ranking.draw_ranking_figure(ranked)
    assert figure is not None
    flops, params, _ = figure.axes
    low, high = params.get_xlim()
    assert high - low > 100 * 0.001, "a thousandth does not fill the panel"
    assert flops.get_xlim()[1] - flops.get_xlim()[0] == pytest.approx(110, rel=0.1)
