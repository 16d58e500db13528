"""Tiers, and how often intervals and tiers are right: simulated coverage."""

import numpy as np
import pytest

from skillnet_evidence.comparison import SystemComparison, compare_systems
from skillnet_evidence.scores import ScoredMetric, ScoredRun
from skillnet_evidence.tiers import build_tier_table, find_tiers
from skillnet_evidence.units import RowOutcomes

#: Studies of one test; the standard error of a coverage of 95 % is at most 1.5 points.
STUDIES = 200


def simulate_study(
    random: np.random.Generator,
    systems: int = 3,
    seeds: int = 3,
    gaps: tuple[float, ...] = (),
    as_rows: bool = False,
) -> SystemComparison:
    """Systems with seeds that vary, and 15 units of 8 rows that each suit a system more or less."""
    units, rows = 15, 8
    unit = np.repeat(np.arange(units), rows)
    hard = random.normal(0, 0.15, units)[unit] + random.normal(0, 0.1, units * rows)
    runs = []
    for number in range(systems):
        suited = random.normal(0, 0.12, units)[unit]
        for seed in range(seeds):
            noise = random.normal(0, 0.1, units * rows) + random.normal(0, 0.02)
            gap = gaps[number] if gaps else 0.0
            score = np.clip(0.5 + gap + hard + suited + noise, 0, 1)
            numbers = np.arange(len(unit)) if as_rows else unit
            ones = np.ones(len(unit))
            outcomes = {
                ("t", "test"): RowOutcomes(score, ones, np.full(len(unit), np.nan), numbers)
            }
            runs.append(ScoredRun(f"s{number}", seed, outcomes, {"t": ScoredMetric("score")}))
    return compare_systems(runs, "s0")


def measure_coverage(as_rows: bool) -> tuple[float, float]:
    """Shares of intervals of a difference that hold 0, and of equal systems in one tier."""
    random = np.random.default_rng(5)
    covered, single = [], []
    for _ in range(STUDIES):
        found = simulate_study(random, as_rows=as_rows)
        covered += [test.difference.low <= 0 <= test.difference.high for test in found.tests]
        single.append(len(find_tiers(found).tiers) == 1)
    return float(np.mean(covered)), float(np.mean(single))


def test_intervals_by_unit_cover_and_rows_as_independent_do_not() -> None:
    covered, single = measure_coverage(as_rows=False)
    assert 0.92 <= covered <= 0.99
    assert single >= 0.92
    covered, single = measure_coverage(as_rows=True)
    assert covered < 0.85
    assert single < 0.8


def test_a_tier_begins_where_a_system_differs_from_the_first_of_its_tier() -> None:
    gaps = (0.0, 0.21, 0.2, 0.01, -0.3)
    found = simulate_study(np.random.default_rng(1), 5, 4, gaps)
    tiers = find_tiers(found)
    assert [set(members) for members in tiers.tiers] == [{"s1", "s2"}, {"s0", "s3"}, {"s4"}]
    assert (tiers.neighbours, tiers.alike, tiers.pairs) == (4, 2, 10)
    assert tiers.describe() == "5 systems in 3 tiers: 2 of 4 neighbours cannot be separated."
    table = build_tier_table(found, tiers)
    assert [row[0].text for row in table.rows] == ["1", "1", "2", "2", "3"]
    assert "not about training again" not in table.caption
    few = simulate_study(np.random.default_rng(1), 2, 1)
    assert "not about training again" in build_tier_table(few, find_tiers(few)).caption


@pytest.mark.parametrize("systems", [1, 2])
def test_systems_without_an_interval_are_one_tier(systems: int) -> None:
    one, runs = np.ones(1), []
    for number in range(systems):
        rows = RowOutcomes(one * (0.5 + number / 4), one, one * np.nan, np.zeros(1, int))
        metrics = {"t": ScoredMetric("score")}
        runs.append(ScoredRun(f"s{number}", 0, {("t", "test"): rows}, metrics))
    assert len(find_tiers(compare_systems(runs, "s0")).tiers) == 1
