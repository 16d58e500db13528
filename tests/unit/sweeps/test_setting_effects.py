"""Effects of a sweep's settings: estimates, intervals, and designs that do not determine them."""

from pathlib import Path

import numpy as np
import pytest

from skillnet_evidence.effects import ScoredTrial, build_effects_table, estimate_effects
from sweeps.search.ranking import draw_ranking_figure, list_scored_trials, rank_configurations
from sweeps.trials.trial import TrialOutcome


def crossed(seeds: int, noise: float = 0.01) -> list[ScoredTrial]:
    """Return trials of two crossed settings: depth is worth 3 points, the other setting nothing."""
    random = np.random.default_rng(0)
    trials = []
    for seed in range(seeds):
        for depth in (1, 2, 4):
            for place in ("both", "one"):
                score = 0.5 + 0.03 * (depth == 4) + 0.1 * seed + random.normal(0, noise)
                settings = {"model.depth": depth, "place": place}
                trials.append(ScoredTrial(f"{depth}{place}", seed, settings, score))
    return trials


def test_effects_are_over_seeds_with_their_interval() -> None:
    found = estimate_effects(crossed(4), ["model.depth", "place"])
    assert [(each.setting, each.value, each.base) for each in found] == [
        ("model.depth", "2", "1"),
        ("model.depth", "4", "1"),
        ("place", "one", "both"),
    ]
    assert {each.source for each in found} == {"seeds"}
    assert found[1].low < 0.03 < found[1].high
    assert found[1].low > 0
    assert found[2].low < 0 < found[2].high
    # Seeds differ by ten points, which cancels.
    assert all(each.high - each.low < 0.06 for each in found)


def test_one_seed_has_the_interval_of_configurations() -> None:
    trials = crossed(1)
    # Six configurations less four coefficients leave two degrees of freedom: too few.
    assert all(np.isnan(each.low) for each in estimate_effects(trials, ["model.depth", "place"]))
    (place,) = estimate_effects(trials, ["place"])
    assert place.source == "configurations"
    assert place.low < place.effect < place.high


def test_drawn_values_are_adjusted_for_each_other() -> None:
    random = np.random.default_rng(1)
    trials = []
    for index in range(24):
        # The better place has been drawn with the worse rates more often.
        place = "one" if random.random() < 0.3 else "both"
        rate = float(np.exp(random.uniform(-1, 0.3 if place == "one" else 1)))
        score = 0.5 + 0.05 * (place == "one") + 0.02 * rate
        trials.append(ScoredTrial(f"{index}", 0, {"rate": rate, "place": place}, score))
    found = estimate_effects(trials, ["rate", "place"])
    assert len([each for each in found if each.setting == "rate"]) == 2
    assert found[0].value.count(" to ") == 1
    (other,) = (each for each in found if each.setting == "place")
    assert abs(other.effect) == pytest.approx(0.05, abs=0.01)


def test_settings_that_vary_together_have_no_effect_of_their_own() -> None:
    trials = [
        ScoredTrial(f"{i}", 0, {"a": i % 2, "b": i % 2, "c": i // 2 % 2}, 0.1 * i) for i in range(8)
    ]
    found = estimate_effects(trials, ["a", "b", "c"])
    assert [each.setting for each in found] == ["c"]
    assert estimate_effects(trials, ["missing"]) == []
    assert estimate_effects([], ["a"]) == []


def test_the_table_states_where_trials_are_too_few() -> None:
    columns, cells, caption = build_effects_table(estimate_effects(crossed(1)[:4], ["place"]))
    assert columns[-1] == "over"
    assert cells == [["place", "one − both", cells[0][2], "too few trials", "–"]]
    assert "Least squares" in caption


def outcome(number: int, rate: float, params: float, flops: float) -> TrialOutcome:
    line = {"step": 1, "score": 0.5 + number, "scores": {}}
    costs = {"activated_params": params, "flops_per_example": flops}
    return TrialOutcome(
        f"00{number}-seed0", f"00{number}", Path(), "finished",
        reports=[line | costs], settings={"training.lr": rate, "model.depth": 2},
    )  # fmt: skip


def test_the_figure_names_the_settings_and_nearly_equal_costs_do_not_fill_its_axis() -> None:
    outcomes = [outcome(0, 0.001, 2.000e6, 1e8), outcome(1, 0.002, 2.001e6, 2e8)]
    rates = [trial.settings["training.lr"] for trial in list_scored_trials(outcomes)]
    assert rates == [0.001, 0.002]
    figure = draw_ranking_figure(rank_configurations(outcomes))
    flops, params, names = figure.axes
    assert {text.get_text() for text in flops.texts} == {"1", "2"}
    (listed,) = names.texts
    assert listed.get_text().splitlines() == ["  1  lr 0.002, depth 2", "  2  lr 0.001, depth 2"]
    low, high = params.get_xlim()
    assert high - low > 100 * 0.001, "a thousandth does not fill the panel"
    assert flops.get_xlim()[1] - flops.get_xlim()[0] == pytest.approx(110, rel=0.1)
