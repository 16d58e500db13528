"""What is made stands in the pages as it was made."""

from pathlib import Path

import numpy as np
import pytest

from lab import RESULTS
from tests.chaos.result_rows import read
from tools.docs import (
    chaos_table,
    coverage_tables,
    merge_tables,
    published_start_tables,
    scale_table,
)
from tools.docs import growth_tables as growth_result
from tools.docs import quickstart_tables as seeds
from tools.docs import sweep_tables as sweep_result
from tools.docs.page_marks import between, put


def test_text_is_put_between_the_marks_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n", encoding="utf-8")
    put(page, "a", "new")
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines == ["before", "<!-- a:begin -->", "new", "<!-- a:end -->", "after"]
    assert between(page, "a") == "new"
    with pytest.raises(ValueError, match="b:begin"):
        put(page, "b", "new")


def test_the_quickstart_page_shows_the_newest_results() -> None:
    path = max(RESULTS.glob("*-quickstart.csv"))
    rows = seeds.read_csv_rows(path)
    assert between(seeds.PAGE, "results") == seeds.page_text(rows, path.name)


def test_an_interval_over_seeds_and_units_covers_the_mean() -> None:
    """The table had 60.2 (59.7 to 60.7) in bold beside 59.5: its interval ignored the rows."""
    random = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        # 3 seeds answer 40 units; both vary, and so does each answer.
        unit_K, seed_S = random.normal(0, 0.1, 40), random.normal(0, 0.01, 3)
        scores_SK = 0.6 + seed_S[:, None] + unit_K + random.normal(0, 0.05, (3, 40))
        rows = [demo_row("skillnet", *mean_of_units(own_K)) for own_K in scores_SK]
        low, high = seeds.combine_intervals(rows)
        alone = seeds.seed_interval([float(row["value"]) for row in rows])
        assert high - low >= alone[1] - alone[0]
        covered.append(low < 0.6 < high)
    assert 0.93 < np.mean(covered)


def mean_of_units(own_K: np.ndarray) -> tuple[float, float, float]:
    half = 2.02 * own_K.std(ddof=1) / len(own_K) ** 0.5
    return own_K.mean(), own_K.mean() - half, own_K.mean() + half


def demo_row(system: str, value: float, low: float, high: float) -> dict[str, str]:
    metric = {"task": "text_classification", "split": "test", "metric": "accuracy"}
    return {"system": system, "seed": "0", **metric} | {
        key: f"{each}" for key, each in (("value", value), ("low", low), ("high", high))
    }


@pytest.mark.parametrize(
    ("reference", "half", "cell"),
    [
        (0.595, 0.05, "60.2 (55.2–65.2)"),
        (0.54, 0.05, "**60.2** (55.2–65.2)"),
        (0.70, 0.05, "60.2 (55.2–65.2)"),
        # A split of one unit has no interval, so no lead.
        (0.54, None, "60.2"),
    ],
)
def test_a_figure_is_bold_if_the_reference_lies_outside(
    reference: float, half: float | None, cell: str
) -> None:
    bounds = (np.nan, np.nan) if half is None else (0.602 - half, 0.602 + half)
    rows = [demo_row("skillnet", 0.602, *bounds) for _ in range(3)]
    rows += [demo_row("chance", 0.1, 0.1, 0.1), demo_row("simple_baseline", reference, 0, 1)]
    keys = (("text_classification", "test", "accuracy"),)
    assert seeds.result_table(rows, keys).endswith(f"| {100 * reference:.1f} | {cell} |")
    # Less is better of an error: chance and the baseline must lie above.
    for row in rows:
        row |= {"metric": "token_error_rate"} | (
            {"value": "0.9"} if row["system"] == "chance" else {}
        )
    text = seeds.result_table(rows, (("text_classification", "test", "token_error_rate"),))
    assert ("**60.2**" in text) == (reference == 0.70)


def test_the_page_of_faults_tells_the_newest_chaos_runs() -> None:
    rows = read(max(RESULTS.glob("*-chaos.csv")))
    assert between(chaos_table.PAGE, "chaos") == chaos_table.table(rows)


def test_the_page_of_scale_shows_the_measurements() -> None:
    assert between(scale_table.PAGE, "scale") == scale_table.tables()


def test_the_page_of_sweeps_tells_those_that_were_kept() -> None:
    assert between(sweep_result.PAGE, "sweep") == sweep_result.page_text()


def test_the_page_of_growth_tells_the_growth_that_was_kept_last() -> None:
    folder = growth_result.newest()
    if folder is None:
        pytest.skip("the page's figures are of a run that was not kept")
    assert between(growth_result.PAGE, "growth") == growth_result.text_of(folder)


def test_the_page_of_merging_shows_the_newest_demonstration() -> None:
    folder = merge_tables.newest_merge()
    assert folder is not None
    assert between(merge_tables.PAGE, "merge") == merge_tables.merge_page_text(folder)


def test_the_page_of_published_weights_shows_the_newest_experiment() -> None:
    folder = published_start_tables.find_newest()
    assert folder is not None
    assert between(published_start_tables.PAGE, "published-start") == (
        published_start_tables.render_page(folder)
    )


@pytest.mark.parametrize("name", coverage_tables.TABLES)
def test_the_page_of_comparisons_shows_the_newest_simulations(name: str) -> None:
    path = coverage_tables.find_newest(name)
    assert between(coverage_tables.PAGE, name) == coverage_tables.render_table(path)
