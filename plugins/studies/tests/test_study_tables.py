"""Blocks of the pages of results: which studies they need, and what they show.

And of the stream of tasks: losses of the records, bytes of its models, its tables and its figure.
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from plugins.studies.tests.kept_studies import CLAIM, keep_study
from skillnet_evidence.claims import estimate_difference
from skillnet_evidence.comparison import MEAN
from skillnet_studies.analysis.finished_runs import compare_runs, label_runs
from skillnet_studies.config.study import NOTICE, STUDY_LEDGER
from skillnet_studies.study.kept_results import (
    RESERVE_RECORD,
    change_kept,
    open_study,
    write_document,
)
from skillnet_studies.study.study import read_study_ledger
from tools.docs import stream_tables, study_tables
from tools.docs.page_marks import between
from tools.docs.stream_tables import StreamResults, read_stream
from tools.docs.study_rates import (
    build_change_table,
    build_rates_table,
    choose_rates_again,
    read_once,
)
from tools.docs.study_rates import main as show_rates
from tools.docs.study_tables import (
    BESIDE_PAGE,
    BLOCKS,
    NOT_COMPLETE,
    RATE_CHANGES,
    RESULTS,
    STREAM_PAGE,
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
    assert "3 systems, 3 replicates each, 5 tasks, 9 runs. runs evaluated " in text
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
    assert "| task | 12 steps | 36 steps | change |" in text
    lines = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert lines[2:] == ["| text to video", "| mean"]


#: Pages of many runs, which take ten times as long to write as the others.
OF_MANY_RUNS = ("scale", "stream")
SLOW = pytest.mark.slow("test_study_tables.py::test_the_page_shows_what_the_kept_studies_give")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[SLOW] if name in OF_MANY_RUNS else []) for name in BLOCKS],
)
def test_the_page_shows_what_the_kept_studies_give(name: str) -> None:
    assert between(BLOCKS[name].page, name) == render_block(BLOCKS[name])


def test_a_gain_from_pretraining_stands_beside_its_further_training() -> None:
    """The pages gave +3.5 by pretraining, and none said that it is at twice the training."""
    folders = [open_study(RESULTS / name) for name in ("rates", "longer")]
    runs = label_runs([run for folder in folders for run in read_once(folder)])
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


def test_the_page_compares_the_differences_at_the_rates_of_both_studies() -> None:
    table = build_change_table(RESULTS / "final", RESULTS / "rates")
    assert between(BESIDE_PAGE, RATE_CHANGES) == table.to_markdown()
    assert "on 5 replicates that both studies have" in table.caption
    pairs = [row[0].text for row in table.rows]
    assert "skillnet-alone − skillnet" in pairs
    assert "moe-pretrained − skillnet-pretrained" in pairs
    assert "skillnet-pretrained − skillnet" not in pairs


def test_rates_lie_beside_the_best_trials_of_the_final_study() -> None:
    table = build_rates_table(RESULTS / "final")
    tried = [float(column) for column in table.columns[4:]]
    assert tried == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    lines = {(row[0].text, row[1].text): [cell.text for cell in row[2:]] for row in table.rows}
    assert len(lines) == 23
    # The study's rate of this task was half of the best one.
    before, again, *scores = lines["skillnet-alone", "speech recognition"]
    assert (float(before), float(again)) == (1.07e-3, 1.72e-3)
    assert scores == ["33.2", "42.7", "51.6", "67.7", "27.2"]
    for _, again, *scores in lines.values():
        means = {rate: float(score) for rate, score in zip(tried, scores, strict=True) if score}
        best = max(means, key=lambda rate: means[rate])
        # The top of a parabola lies within its three rates.
        assert best / 2 <= float(again) <= best * 2


def test_settings_of_the_space_stay_those_of_the_study() -> None:
    before, _ = read_study_ledger(RESULTS / "final")
    for label, own in choose_rates_again(RESULTS / "final").items():
        assert own.settings.keys() == before[label].settings.keys()
        kept = {key for key in own.settings if not key.endswith(".lr")}
        assert {key: own.settings[key] for key in kept} == {
            key: before[label].settings[key] for key in kept
        }


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert show_rates([str(RESULTS / "final")]) == 0
    assert "moe-pretrained" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        show_rates([str(tmp_path / "nowhere")])
    assert "nowhere" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stream() -> StreamResults:
    kept = read_stream()
    assert kept is not None
    return kept


def test_the_pages_show_the_kept_stream(stream: StreamResults) -> None:
    assert between(stream_tables.README, "results") == stream_tables.tabulate_readme(stream)
    for name, text in stream_tables.render_page(stream).items():
        assert between(STREAM_PAGE, name) == text
    figure = stream_tables.encode_svg(stream_tables.draw_stream(stream))
    assert stream_tables.FIGURE.read_text(encoding="utf-8") == figure


def test_a_part_of_the_stream_is_not_shown(tmp_path: Path) -> None:
    folder = keep_study(tmp_path, "stream", {"skillnet": 0.5})
    with change_kept(folder) as kept:
        kept.content[STUDY_LEDGER]["runs"].pop()
    assert read_stream(folder) is None
    assert set(stream_tables.render_page(None).values()) == {NOT_COMPLETE}


def test_losses_are_those_of_the_records(stream: StreamResults) -> None:
    cells = [own for run, own in stream.find_cells("replay-100")]
    expected = fmean(
        own["before"][task]["score"] - own["after"][task]["score"]
        for own in cells
        for task in stream.old_tasks
    )
    lost = stream.estimate_loss("replay-100", stream.old_tasks)
    assert lost is not None
    assert lost.value == pytest.approx(expected)
    assert lost.low < expected < lost.high
    # Copies leave the base as it is.
    assert stream.estimate_loss("full-100", stream.old_tasks) is None


def test_bytes_of_an_added_task_are_those_of_its_weights(stream: StreamResults) -> None:
    """What the sizes of whole models leave is what a growth trained, by another way of counting."""
    heads = fmean(x for _, own in stream.find_cells("head-100") for x in own["trained"].values())
    assert stream.count_added_bytes("head-100") == pytest.approx(4 * heads)
    assert stream.count_added_bytes("replay-100") == pytest.approx(4 * heads)
    assert stream.count_added_bytes("full-100") > stream.count_added_bytes("grow-100") > 4 * heads
