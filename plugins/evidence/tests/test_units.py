"""Scores over held-out units: effects of units, and intervals that hold their score."""

import numpy as np
import pytest

from skillnet_evidence.units import (
    bound_score,
    compute_least_error,
    compute_unit_error,
    jackknife_units,
    number_units,
)


def test_units_are_numbered_by_their_first_rows() -> None:
    assert number_units(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]
    assert number_units([]).tolist() == []


def test_effects_are_those_of_leaving_a_unit_out() -> None:
    random = np.random.default_rng(0)
    weight = random.integers(1, 5, 30).astype(float)
    amounts = weight * random.random((2, 30))
    unit = np.sort(random.integers(0, 7, 30))
    found = jackknife_units(amounts, weight, unit)
    assert found.values_S == pytest.approx(amounts.sum(1) / weight.sum())
    for k in range(7):
        kept = unit != k
        without = amounts[:, kept].sum(1) / weight[kept].sum()
        assert found.effects_SK[:, k] == pytest.approx(6 * (found.values_S - without))


def test_rows_without_units_have_the_usual_standard_error() -> None:
    hits = np.random.default_rng(0).random(200) < 0.3
    found = jackknife_units(hits, np.ones(200))
    assert found.dof == pytest.approx(199)
    assert compute_unit_error(found.effects_SK[0]) == pytest.approx(hits.std(ddof=1) / np.sqrt(200))


def test_units_of_different_sizes_count_as_fewer() -> None:
    unit = np.repeat(np.arange(4), [1, 1, 1, 97])
    assert jackknife_units(np.ones(100), np.ones(100), unit).dof < 0.1
    with pytest.raises(ValueError, match="must sum to more than 0"):
        jackknife_units(np.ones(3), np.zeros(3))


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_intervals_of_few_uneven_units_cover(rho: float) -> None:
    """Rows as observations would cover 29 % of the cases with equal rows in a unit."""
    random = np.random.default_rng(0)
    sizes = np.array([100, 60, 40, 30, 20, 15, 10, 5, 3, 2])
    unit, total = np.repeat(np.arange(10), sizes), sizes.sum()
    trials = 2000
    values = random.normal(size=(trials, 10))[:, unit] * rho
    values += random.normal(size=(trials, total)) * (1 - rho)
    found = jackknife_units(values, np.ones(total), unit)
    covered = [
        low <= 0 <= high
        for low, high in (
            bound_score(value, compute_unit_error(effects), found.dof, 10)
            for value, effects in zip(found.values_S, found.effects_SK, strict=True)
        )
    ]
    assert 0.93 < np.mean(covered) < 0.975


@pytest.mark.parametrize("scale", ["share", "error_rate", "free"])
@pytest.mark.parametrize("value", [0.0, 0.001, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("error", [0.0, 1e-4, 0.02])
def test_an_interval_holds_its_score_and_has_a_width(scale, value, error):
    low, high = bound_score(value, error, 20, 21, scale)
    assert low <= value <= high
    assert high - low > 1e-5
    if scale == "share":
        assert 0 <= low < high <= 1
    if scale == "error_rate":
        assert low >= 0


def test_all_right_has_the_interval_of_wilson() -> None:
    """The numbers follow from the formula of Wilson (1927) with z = 1.96."""
    low, high = bound_score(1.0, 0.0, 1e9, 50, "share")
    assert (low, high) == (pytest.approx(0.928652, abs=1e-6), 1.0)
    low, high = bound_score(0.4, np.sqrt(0.24 / 50), 1e9, 50, "share")
    assert (low, high) == (pytest.approx(0.276084, abs=1e-5), pytest.approx(0.538186, abs=1e-5))
    assert compute_least_error(50, 1e9) * 1.959964 == pytest.approx(1 - 0.928652, abs=1e-6)


def test_one_unit_has_no_interval() -> None:
    found = jackknife_units(np.array([1.0, 0.0, 1.0]), np.ones(3), np.zeros(3))
    assert np.isnan(compute_unit_error(found.effects_SK[0]))
    assert np.isnan(bound_score(2 / 3, float("nan"), found.dof, 1, "share")).all()
    assert np.isnan(compute_least_error(1, 0.0))
