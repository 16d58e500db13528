"""Blocks of the page of results: which studies they need, and what they show."""

from dataclasses import replace
from pathlib import Path

import pytest

from plugins.studies.tests.kept_studies import CLAIM, keep_study
from skillnet_evidence.claims import estimate_difference
from skillnet_evidence.comparison import MEAN
from skillnet_studies.analysis.finished_runs import compare_runs, label_runs, read_run
from skillnet_studies.config.study import NOTICE, STUDY_LEDGER
from skillnet_studies.study.kept_results import RESERVE_RECORD, change_kept, write_document
from skillnet_studies.study.study import read_study_ledger
from tools.docs import study_tables
from tools.docs.page_marks import between
from tools.docs.study_rates import build_change_table, build_rates_table
from tools.docs.study_tables import (
    BESIDE_PAGE,
    BLOCKS,
    CHOSEN_RATES,
    NOT_COMPLETE,
    RATE_CHANGES,
    RESULTS,
    StudyBlock,
    render_block,
    select_runs,
)

FINAL = StudyBlock(("final",), BLOCKS["final"].tables)


def test_a_block_shows_the_answer_and_its_tables(tmp_path: Path) -> None:
    systems = {"skillnet": 0.5, "specialist": 0.0, "moe": 0.4}
    folder = keep_study(tmp_path, "final", systems, stated={"skills": CLAIM})
    text = render_block(FINAL, tmp_path / "results")
    assert "Skills help" in text
    assert "3 systems, 3 replicates each, 5 tasks, 9 runs. runs at commit 0123456789ab" in text
    titles = [line[5:] for line in text.splitlines() if line.startswith("#### ")]
    assert titles == ["Claims", study_tables.SCORES, study_tables.DIFFERENCES, "Cost"]
    assert "| moe − skillnet |" in text
    # The text depends on the kept files alone.
    assert render_block(FINAL, tmp_path / "results") == text
    assert "report at commit" not in text
    # Limits that were found after the study stand beside the answer.
    with change_kept(folder) as kept:
        kept.content[NOTICE] = "Rates of baselines were low.\n"
    lines = render_block(FINAL, tmp_path / "results").splitlines()
    assert lines[:3] == ["**Notice:** Rates of baselines were low.", "", text.splitlines()[0]]
    # Nobody looks at a part of a study, or at a reserve that was not opened.
    reserve = replace(FINAL, is_reserve=True)
    assert render_block(reserve, tmp_path / "results") == NOT_COMPLETE
    write_document(folder, RESERVE_RECORD, {"reads": [{"finished": None}]})
    assert render_block(reserve, tmp_path / "results") == NOT_COMPLETE
    with change_kept(folder) as kept:
        kept.content[STUDY_LEDGER]["runs"].pop()
    assert render_block(FINAL, tmp_path / "results") == NOT_COMPLETE
    with change_kept(folder) as kept:
        del kept.content[STUDY_LEDGER]
    assert render_block(FINAL, tmp_path / "results") == NOT_COMPLETE, "it is still being tuned"


def test_runs_of_two_studies_are_compared_on_the_folds_that_they_share(tmp_path: Path) -> None:
    keep_study(tmp_path, "rates", {"skillnet": 0.5, "specialist": 0.0, "moe": 0.4})
    results = tmp_path / "results"
    assert render_block(BLOCKS["longer"], results) == NOT_COMPLETE, "the other study is missing"
    keep_study(tmp_path, "longer", {"skillnet-long": 0.5, "specialist-long": 0.5}, folds=2)
    text = render_block(BLOCKS["longer"], results)
    assert "4 systems, 2 replicates each, 5 tasks, 8 runs" in text
    assert "| systems | task | 12 steps | 36 steps | change |" in text
    assert "moe" not in text


@pytest.mark.parametrize("name", BLOCKS)
def test_the_page_shows_what_the_kept_studies_give(name: str) -> None:
    assert between(BLOCKS[name].page, name) == render_block(BLOCKS[name])


def test_a_gain_from_pretraining_stands_beside_its_further_training() -> None:
    """The pages gave +3.5 by pretraining, and none said that it is at twice the training."""
    members = [
        each for name in ("rates", "longer") for each in read_study_ledger(RESULTS / name)[1]
    ]
    runs = label_runs([read_run(folder, label) for label, folder in members])
    systems = ("skillnet-long", "skillnet-pretrained")
    compared = compare_runs(select_runs(runs, systems), "skillnet-long")
    more = estimate_difference(compared, *systems, MEAN)
    number = f"{100 * more.value:.1f}"
    bounds = [f"{sign}{100 * more.low:.1f} to {sign}{100 * more.high:.1f}" for sign in ("+", "")]
    for page in ("README.md", "docs/pretraining.md", "docs/results/final.md", BESIDE_PAGE):
        text = " ".join((RESULTS.parents[1] / page).read_text(encoding="utf-8").split())
        stated = [f"{number}{word} ({each})" for word in ("", " points") for each in bounds]
        assert any(each in text for each in stated), page
        assert "equal-steps" in text
        assert "twice the training" in text


def test_the_page_has_the_rates_that_the_present_rule_chooses() -> None:
    table = build_rates_table(RESULTS / "final")
    assert between(BESIDE_PAGE, CHOSEN_RATES) == table.to_markdown()


def test_the_page_compares_the_differences_at_the_rates_of_both_studies() -> None:
    table = build_change_table(RESULTS / "final", RESULTS / "rates")
    assert between(BESIDE_PAGE, RATE_CHANGES) == table.to_markdown()
    assert "on 5 replicates that both studies have" in table.caption
    pairs = [row[0].text for row in table.rows]
    assert "skillnet-alone − skillnet" in pairs
    assert "moe-pretrained − skillnet-pretrained" in pairs
    assert "skillnet-pretrained − skillnet" not in pairs
