"""Power of a planned study: from an earlier one, and as simulated."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from plugins.evidence.tests.drawn_runs import TASKS, compared, draw_run
from skillnet_evidence.claims import Claim, ClaimsConfig, Condition
from skillnet_evidence.comparison import MEAN, SHARED_MEAN, SystemComparison, compare_systems
from skillnet_evidence.errors import EvidenceError
from skillnet_evidence.power import (
    EFFECTS,
    PlannedTest,
    build_power_table,
    estimate_time,
    plan_power,
    simulate_claims,
)
from skillnet_evidence.scores import RunFold
from skillnet_evidence.statistics import RunSample, compute_p_value, estimate_mean


@pytest.fixture(scope="module")
def earlier() -> SystemComparison:
    """Build a comparison of two equal systems with six seeds."""
    return compared({"skillnet": 0.0, "dense": 0.0}, seeds=range(6))


def claims(test: str, margin: float = 0.05) -> ClaimsConfig:
    part = Condition("skillnet", "specialist", test, [MEAN])
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
    assert found[24].error > (2 * by_seed.variance / 24) ** 0.5
    # "Higher" is shown by chance alone if both are equal.
    shown = simulate_claims([found[6]], claims("higher"))["it"]
    assert shown[0] == pytest.approx(0.025, abs=0.01)
    assert list(shown) == sorted(shown)
    config = claims("not_lower", 0.5)
    wide = plan_power(earlier, config, {"skillnet": 6, "specialist": 6})
    assert simulate_claims(wide, config)["it"][0] > 0.99


def test_the_power_is_that_of_simulated_studies(earlier: SystemComparison) -> None:
    replicates = {"skillnet": 8, "specialist": 8}
    (plan,) = plan_power(earlier, claims("not_lower", 0.02), replicates)
    spread = earlier.spreads[MEAN, "test"]
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
    simulated = simulate_claims([plan], claims("not_lower", 0.02))["it"][0]
    assert shown / trials == pytest.approx(simulated, abs=0.05)
    assert found / trials == pytest.approx(0.8, abs=0.05)


def test_a_study_without_claims_plans_its_differences(earlier: SystemComparison) -> None:
    planned = plan_power(earlier, ClaimsConfig(), {"skillnet": 3, "dense": 3, "moe": 3})
    assert [(each.difference, each.task) for each in planned] == [
        (f"{label} − skillnet", task.replace("_", " "))
        for label in ("dense", "moe")
        for task in (*TASKS, MEAN)
    ]
    table = build_power_table("x", planned, simulate_claims(planned, ClaimsConfig(), 50))
    assert all(len(row) == len(table.columns) for row in table.rows)
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
    assert "nan" not in replace(time, hours=float("nan")).describe()


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


def read_cells(
    planned: Sequence[PlannedTest], shares: Mapping[str, Sequence[float]]
) -> list[list[str]]:
    return [[cell.text for cell in row] for row in build_power_table("x", planned, shares).rows]


def test_a_conjunction_holds_less_often_than_each_of_its_tests(earlier: SystemComparison) -> None:
    part = Condition("skillnet", "dense", "not_lower", [])
    config = ClaimsConfig({"it": Claim("x", [part])}, margin=0.05)
    planned = plan_power(earlier, config, {"skillnet": 6, "dense": 6})
    shares = simulate_claims(planned, config)
    cells = read_cells(planned, shares)
    assert len(cells) == len(planned) == len(TASKS)
    single = [
        stats.nct.sf(stats.t.ppf(0.975, each.dof), each.dof, 0.05 / each.error) for each in planned
    ]
    # Independent tests: the product of their probabilities.
    assert shares["it"][0] == pytest.approx(np.prod(single), abs=0.03)
    assert cells[0][-1] == ", ".join(f"{100 * share:.0f}" for share in shares["it"]) + " %"
    assert {row[-1] for row in cells[1:]} == {""}


def test_planned_claims_are_corrected_together_or_tested_in_order(earlier):
    part = Condition("skillnet", "dense", tasks=[MEAN])
    stated = {f"{n}": Claim("x", [part]) for n in range(5)}
    counts = {"skillnet": 6, "dense": 6}
    alone, family, chain = (
        simulate_claims(plan_power(earlier, each, counts), each)
        for each in (
            ClaimsConfig({"0": stated["0"]}),
            ClaimsConfig(stated),
            ClaimsConfig(stated, list(stated)),
        )
    )
    assert family["0"][0] < alone["0"][0] == chain["0"][0]
    assert family["0"][2] < alone["0"][2]
    assert list(np.diff([chain[name][2] for name in stated]) <= 0) == [True] * 4


def test_the_power_of_a_difference_of_differences_is_that_of_four_systems() -> None:
    labels = ("one", "other", "third", "fourth")
    for more in ({}, {"fold": True}):
        runs = [
            draw_run(x, number, **({"fold": RunFold(number, 0.25)} if more else {}))
            for x in labels
            for number in range(5)
        ]
        earlier = compare_systems(runs, "one")
        counts, overlap = dict.fromkeys((*labels, "new"), 5), 0.25 if more else None
        part = Condition("one", "other", tasks=[MEAN], beyond=["third", "fourth"])
        config = ClaimsConfig({"it": Claim("x", [part])})
        (plan,) = plan_power(earlier, config, counts, overlap)
        # The same plan expects the error that the earlier study has.
        change = estimate_mean(*earlier.subtract_scores("one", "other", MEAN, part.beyond))
        assert plan.error == pytest.approx(change.std_error, rel=0.2)
        assert plan.difference == "(one − other) − (third − fourth)"
        # Of systems that were not run, the variance of two average differences is expected.
        part = replace(part, beyond=["third", "new"])
        (other,) = plan_power(earlier, ClaimsConfig({"it": Claim("x", [part])}), counts, overlap)
        pair = Condition("one", "new", tasks=[MEAN])
        (single,) = plan_power(earlier, ClaimsConfig({"it": Claim("x", [pair])}), counts, overlap)
        assert other.error == pytest.approx(2**0.5 * single.error)


def test_the_power_of_equivalence_falls_with_the_true_difference(earlier):
    counts = {"skillnet": 40, "specialist": 40}
    (plan,) = plan_power(earlier, claims("equivalent", 0.04), counts)
    margin = 2.8 * plan.error
    config = claims("equivalent", margin)
    (plan,) = plan_power(earlier, config, counts)
    shares = simulate_claims([plan], config)["it"]
    assert shares[0] > shares[1] > shares[4]
    # Beyond the margin it is shown in at most 2.5 of 100 studies.
    assert margin < EFFECTS[4]
    assert shares[4] <= 0.03
    inside = margin / plan.error - stats.t.ppf(0.975, plan.dof)
    assert shares[0] == pytest.approx(2 * stats.norm.cdf(inside) - 1, abs=0.06)
    cells = read_cells([plan], {"it": shares})
    assert cells[0][5:7] == [f"±{100 * margin:g}", "–"]


def test_a_shared_mean_is_planned_from_a_pilot_with_its_systems() -> None:
    runs = [
        draw_run(label, number, tasks=tasks, fold=RunFold(number, 0.25))
        for label, tasks in (("a-2", TASKS[:2]), ("a-5", TASKS), ("b-5", TASKS))
        for number in range(4)
    ]
    pilot = compare_systems(runs, "a-2")
    counts = dict.fromkeys(("a-5", "b-5", "c-5"), 4)
    part = Condition("a-5", "b-5", tasks=[SHARED_MEAN])
    (plan,) = plan_power(pilot, ClaimsConfig({"it": Claim("x", [part])}), counts, 0.25)
    assert plan.task == "mean of 5 tasks"
    change = estimate_mean(*pilot.subtract_scores("a-5", "b-5", SHARED_MEAN))
    assert plan.error == pytest.approx(change.std_error)
    part = replace(part, against="c-5")
    with pytest.raises(EvidenceError, match="the shared mean of a-5 − c-5 needs an earlier study"):
        plan_power(pilot, ClaimsConfig({"it": Claim("x", [part])}), counts, 0.25)
