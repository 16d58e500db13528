"""Power of a planned study: from an earlier one, and as simulated."""

import numpy as np
import pytest

from plugins.evidence.tests.drawn_runs import TASKS, compared, draw_run
from skillnet_evidence.claims import Claim, ClaimsConfig, Condition
from skillnet_evidence.comparison import MEAN, SystemComparison, compare_systems
from skillnet_evidence.errors import EvidenceError
from skillnet_evidence.power import estimate_time, plan_power, tabulate_power
from skillnet_evidence.scores import RunFold
from skillnet_evidence.statistics import RunSample, compute_p_value, estimate_mean


@pytest.fixture(scope="module")
def earlier() -> SystemComparison:
    """Build a comparison of two equal systems with six seeds."""
    return compared({"skillnet": 0.0, "dense": 0.0}, seeds=range(6))


def claims(test: str, margin: float = 0.05) -> ClaimsConfig:
    part = Condition("skillnet", "specialist", test, [MEAN])  # type: ignore[arg-type]
    return ClaimsConfig({"it": Claim("x", [part])}, margin=margin)


def test_more_seeds_find_smaller_differences(earlier: SystemComparison) -> None:
    """The planned specialist was not run; the variances of the pair that was run are taken."""
    found = {
        count: plan_power(earlier, claims("higher"), {"skillnet": count, "specialist": count})[0]
        for count in (3, 6, 24)
    }
    assert found[3].detectable > found[6].detectable > found[24].detectable > 0
    # Units limit what seeds can do.
    by_seed = earlier.spreads[MEAN, "test"]
    assert by_seed is not None
    assert found[24].error > (2 * by_seed.variance / 24) ** 0.5
    # "Higher" is shown by chance alone if both are equal.
    assert found[6].shown_if_equal == pytest.approx(0.025)
    wide = plan_power(earlier, claims("not_lower", 0.5), {"skillnet": 6, "specialist": 6})[0]
    assert wide.shown_if_equal > 0.99


def test_the_power_is_that_of_simulated_studies(earlier: SystemComparison) -> None:
    replicates = {"skillnet": 8, "specialist": 8}
    (plan,) = plan_power(earlier, claims("not_lower", 0.02), replicates)
    spread = earlier.spreads[MEAN, "test"]
    assert spread is not None
    over_units = plan.error**2 - 2 * spread.variance / 8
    random, shown, found, trials = np.random.default_rng(0), 0, 0, 1500
    for _ in range(trials):
        common_K = random.normal(0, over_units**0.5 * 400**0.5, 400)
        own, other = (
            RunSample(
                tuple(range(8)),
                random.normal(0, spread.variance**0.5, 8),
                {"t": np.tile(effects_K - effects_K.mean(), (8, 1))},
                {"t": 399.0},
            )
            for effects_K in (common_K, np.zeros(400))
        )
        # The units of this study, whose effects the scores contain.
        own = RunSample(own.seeds, own.values + common_K.mean(), own.effects, own.dofs)
        change = own - other
        shown += estimate_mean(change).low > -0.02
        found += compute_p_value(change, null=-plan.detectable) <= 0.05
    assert shown / trials == pytest.approx(plan.shown_if_equal, abs=0.05)
    assert found / trials == pytest.approx(0.8, abs=0.05)


def test_a_study_without_claims_plans_its_differences(earlier: SystemComparison) -> None:
    planned = plan_power(earlier, ClaimsConfig(), {"skillnet": 3, "dense": 3, "moe": 3})
    assert [(each.system, each.task) for each in planned] == [
        (label, task) for label in ("dense", "moe") for task in (*TASKS, MEAN)
    ]
    columns, cells = tabulate_power(planned)
    assert all(len(row) == len(columns) for row in cells)
    with pytest.raises(EvidenceError, match="--power: the earlier study has no task reading"):
        plan_power(
            earlier,
            ClaimsConfig({"it": Claim("x", [Condition("a", "b", tasks=["reading"])])}),
            {"a": 3, "b": 3},
        )


def test_one_seed_has_no_known_variance() -> None:
    single = compared({"skillnet": 0.0, "dense": 0.0}, seeds=(0,))
    with pytest.raises(EvidenceError, match="one seed per system, so the variance over seeds"):
        plan_power(single, ClaimsConfig(), {"skillnet": 3, "dense": 3})


def test_folds_and_times_of_a_planned_study(earlier: SystemComparison) -> None:
    plans = [
        plan_power(
            earlier,
            claims("not_lower", 0.02),
            {"skillnet": 2 * count, "specialist": 2 * count},
            1 / (count - 1),
        )[0]
        for count in (5, 10)
    ]
    # More folds train on more rows, and the training sets of two folds differ less.
    assert plans[0].error > plans[1].error
    assert plans[1].seeds == 20
    steps = dict.fromkeys(("skillnet", "dense", "moe"), 24)
    time = estimate_time(earlier, {"skillnet": 20, "dense": 10, "moe": 10}, steps)
    # Twelve steps take 3.5 s and one second more with each seed, 6 s on average.
    assert time.runs == 40
    assert time.hours == pytest.approx(40 * 12 / 3600)
    assert "40 final runs take 0.1 hours" in time.describe()
    assert time.describe().endswith("assumed for moe")


def test_a_study_of_folds_is_planned_from_another_one() -> None:
    labels = ("skillnet", "specialist")
    runs = [draw_run(x, number, fold=RunFold(number, 0.25)) for x in labels for number in range(5)]
    earlier = compare_systems(runs)
    counts = dict.fromkeys(labels, 5)
    (same,) = plan_power(earlier, claims("not_lower", 0.02), counts, 0.25)
    # The same plan expects the error that the earlier study has.
    change = estimate_mean(*earlier.subtract_scores("skillnet", "specialist", MEAN))
    assert same.error == pytest.approx(change.std_error)
    twice = dict.fromkeys(labels, 10)
    (more,) = plan_power(earlier, claims("not_lower", 0.02), twice, 0.25)
    assert more.error < same.error
    # Runs that share training rows do not become independent by their number.
    assert more.error > same.error / 2**0.5
    with pytest.raises(EvidenceError, match="or plan one with folds"):
        plan_power(earlier, claims("not_lower", 0.02), counts)


def test_a_conjunction_has_bounds_for_all_of_its_tests(earlier: SystemComparison) -> None:
    part = Condition("skillnet", "dense", "not_lower", [])
    config = ClaimsConfig({"it": Claim("x", [part])}, margin=0.05)
    planned = plan_power(earlier, config, {"skillnet": 6, "dense": 6})
    _, cells = tabulate_power(planned)
    assert len(cells) == len(planned) + 1 == len(TASKS) + 1
    shown = [each.shown_if_equal for each in planned]
    least = max(1 - sum(1 - p for p in shown), 0.0)
    assert cells[-1][1] == "all 5 tests"
    assert cells[-1][-1] == f"{100 * least:.0f} to {100 * min(shown):.0f} %"
