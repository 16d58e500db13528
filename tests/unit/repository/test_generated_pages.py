"""What is made stands in the pages as it was made."""

from pathlib import Path

import pytest

from benchmarks.measure import RESULTS
from tests.chaos.result_rows import read
from tools.docs import chaos_table, coverage_tables, merge_tables, scale_table
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


def test_the_quickstart_pages_show_the_newest_results() -> None:
    path = max(RESULTS.glob("*-quickstart.csv"))
    rows = seeds.read_rows(path)
    assert between(seeds.README, "results") == seeds.readme_text(rows)
    assert between(seeds.PAGE, "results") == seeds.page_text(rows, path.name)


def test_the_page_of_faults_tells_the_newest_chaos_runs() -> None:
    rows = read(max(RESULTS.glob("*-chaos.csv")))
    assert between(chaos_table.PAGE, "chaos") == chaos_table.table(rows)


def test_the_page_of_scale_tells_what_was_measured() -> None:
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


@pytest.mark.parametrize("name", coverage_tables.TABLES)
def test_the_page_of_comparisons_shows_the_newest_simulations(name: str) -> None:
    path = coverage_tables.find_newest(name)
    assert between(coverage_tables.PAGE, name) == coverage_tables.render_table(path)
