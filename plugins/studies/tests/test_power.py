"""Power of a planned study: from an earlier one, and as simulated."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.data.config.folds import FoldConfig
from skillnet_platform.errors import UserError
from skillnet_studies.analysis.comparison import MEAN, SystemComparison, compare_systems
from skillnet_studies.analysis.finished_runs import read_run
from skillnet_studies.analysis.power import estimate_time, plan_power, tabulate_power
from skillnet_studies.analysis.run_groups import label_runs
from skillnet_studies.analysis.statistics import (
    RunSample,
    SampleDifference,
    compute_p_value,
    estimate_mean,
)
from skillnet_studies.config.claims import ClaimPart, ClaimsConfig, StatedClaim
from tests.helpers.synthetic_runs import TASKS, set_fold, write_run, write_study


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> SystemComparison:
    """Build a comparison of two equal systems with six seeds."""
    paths = write_study(
        tmp_path_factory.mktemp("runs"), {"skillnet": 0.0, "dense": 0.0}, seeds=range(6)
    )
    return compare_systems(label_runs([read_run(path) for path in paths]))


def claims(test: str, margin: float = 0.05) -> ClaimsConfig:
    part = ClaimPart("skillnet", "specialist", test, [MEAN])  # type: ignore[arg-type]
    return ClaimsConfig({"it": StatedClaim("x", [part])}, margin=margin)


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
        change = SampleDifference(own, other)
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
    with pytest.raises(UserError, match="--power: the earlier study has no task reading"):
        plan_power(
            earlier,
            ClaimsConfig({"it": StatedClaim("x", [ClaimPart("a", "b", tasks=["reading"])])}),
            {"a": 3, "b": 3},
        )


def test_one_seed_has_no_known_variance(tmp_path: Path) -> None:
    paths = write_study(tmp_path, {"skillnet": 0.0, "dense": 0.0}, seeds=(0,))
    single = compare_systems(label_runs([read_run(path) for path in paths]))
    with pytest.raises(UserError, match="one seed per system, so the variance over seeds is unkn"):
        plan_power(single, ClaimsConfig(), {"skillnet": 3, "dense": 3})


def test_folds_and_times_of_a_planned_study(earlier: SystemComparison) -> None:
    plans = [
        plan_power(
            earlier,
            claims("not_lower", 0.02),
            {"skillnet": 2 * count, "specialist": 2 * count},
            FoldConfig(count),
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


def test_a_study_of_folds_is_planned_from_another_one(tmp_path: Path) -> None:
    labels = ("skillnet", "specialist")
    paths = []
    for number in range(5):
        for label in labels:
            run = write_run(tmp_path / f"{label}-{number}", label, seed=number)
            paths.append(set_fold(run, FoldConfig(5, number)))
    earlier = compare_systems(label_runs([read_run(path) for path in paths]))
    counts = dict.fromkeys(labels, 5)
    (same,) = plan_power(earlier, claims("not_lower", 0.02), counts, FoldConfig(5))
    # The same plan expects the error that the earlier study has.
    change = estimate_mean(*earlier.subtract_scores("skillnet", "specialist", MEAN))
    assert same.error == pytest.approx(change.std_error)
    twice = dict.fromkeys(labels, 10)
    (more,) = plan_power(earlier, claims("not_lower", 0.02), twice, FoldConfig(5))
    assert more.error < same.error
    # Runs that share training rows do not become independent by their number.
    assert more.error > same.error / 2**0.5
    with pytest.raises(UserError, match="or plan one with folds"):
        plan_power(earlier, claims("not_lower", 0.02), counts)


def test_a_conjunction_has_bounds_for_all_of_its_tests(earlier: SystemComparison) -> None:
    part = ClaimPart("skillnet", "dense", "not_lower", [])
    config = ClaimsConfig({"it": StatedClaim("x", [part])}, margin=0.05)
    planned = plan_power(earlier, config, {"skillnet": 6, "dense": 6})
    _, cells = tabulate_power(planned)
    assert len(cells) == len(planned) + 1 == len(TASKS) + 1
    shown = [each.shown_if_equal for each in planned]
    least = max(1 - sum(1 - p for p in shown), 0.0)
    assert cells[-1][1] == "all 5 tests"
    assert cells[-1][-1] == f"{100 * least:.0f} to {100 * min(shown):.0f} %"
