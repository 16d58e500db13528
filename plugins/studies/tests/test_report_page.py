"""The page of a comparison: answer, evidence and one table first; everything else folds."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measure import read_csv_rows
from pipelines.data.config.folds import FoldConfig
from pipelines.training.evaluation.simple_baselines import evaluate_simple_baselines
from skillnet_evidence.budget import estimate_budgets, estimate_ratio, find_crossing
from skillnet_evidence.claims import Claim, ClaimsConfig, Condition, sort_systems
from skillnet_evidence.comparison import MEAN, SystemComparison
from skillnet_evidence.figures import draw_joint_evidence
from skillnet_evidence.rows import (
    build_claim_rows,
    build_summary_rows,
    build_test_rows,
    collect_points,
    group_claims,
    group_tests,
)
from skillnet_evidence.tables import MAX_ROWS
from skillnet_platform import console
from skillnet_platform.tracking.source_commit import find_source_commit
from skillnet_studies.analysis.finished_runs import compare_runs, label_runs, read_run
from skillnet_studies.config.study import REFERENCES_FILE
from skillnet_studies.report import report as reporting
from skillnet_studies.report.references import (
    build_references,
    collect_reference_scores,
    find_reference_scores,
)
from skillnet_studies.report.report import render_report, write_report
from skillnet_studies.study.kept_results import write_document
from tests.helpers import readable_corpora, small_corpora
from tests.helpers.synthetic_runs import (
    TASKS,
    paper_claims,
    set_fold,
    write_curve,
    write_run,
    write_study,
)
from tools.docs import draw_study

SYSTEMS = {
    "dense": -0.6,
    "skillnet": 0.5,
    "moe": 0.4,
    "skillnet-pretrained": 1.2,
    "specialist": 0.0,
    "specialist-pretrained": 0.2,
}
REFERENCES = {(task, "test"): 0.4 for task in TASKS}


def compared(root: Path, systems: dict[str, float]) -> SystemComparison:
    folders = write_study(root, systems, seeds=(0, 1, 2))
    return compare_runs(label_runs([read_run(folder) for folder in folders]))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> SystemComparison:
    return compared(tmp_path_factory.mktemp("runs"), SYSTEMS)


@pytest.fixture(scope="module")
def report(comparison: SystemComparison) -> reporting.ComparisonReport:
    return reporting.build_report(comparison, "six", paper_claims(), references=REFERENCES)


@pytest.fixture(scope="module")
def page(report: reporting.ComparisonReport) -> str:
    return render_report(report)


class Folds(HTMLParser):
    """Texts and tags of a page outside of folds, and the summaries of its folds."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.depth, self.text, self.rows = 0, "", 0
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.depth += tag == "details"
        if not self.depth:
            self.tags.append(tag)
            self.rows += tag == "tr"

    def handle_endtag(self, tag):
        self.depth -= tag == "details"

    def handle_data(self, data):
        self.text += data if not self.depth else ""


def test_the_answer_the_figures_and_one_short_table_come_first(report, page):
    shown = Folds(page.partition("<body>")[2])
    assert report.answer.startswith("Shown: One pretrained SkillNet scores as high as five")
    assert re.search(r"least favourable of 5 scores: [a-z ]+ [+−][\d.]+ points \(", report.answer)
    assert shown.text.index(report.answer) < shown.text.index("Claims")
    holding = sum(claim.verdict == "holds" for claim in report.claims)
    assert report.lead.startswith(f"{holding} of 4 claims hold, 6 systems, ")
    # Two figures stand side by side, and one table: a head and at most six rows.
    assert shown.tags.count("img") == 2
    assert shown.tags.count("table") == 1
    assert shown.rows <= 1 + MAX_ROWS
    assert "machine " in shown.text
    assert f"runs at commit 0123456789ab · report at commit {find_source_commit()}" in shown.text
    assert "Simple references (TF-IDF, nearest neighbours): text classification 40.0" in shown.text
    for title in ("Results on held-out rows", "Rule:", "Plot: learning", "torch "):
        assert title not in shown.text
        assert title in page


@pytest.mark.slow("test_report_page.py::test_the_answer_the_figures_and_one_short_table_come_first")
def test_a_study_of_unequal_tasks_shows_its_series(tmp_path: Path) -> None:
    runs = []
    for system in ("skillnet", "dense"):
        for count in (2, 5):
            label = f"{system}-{count}"
            for seed in range(3):
                folder = tmp_path / f"{label}-seed{seed}"
                write_run(folder, system, seed, tasks=TASKS[:count], activated=100 * count)
                runs.append(read_run(folder, label))
    part = Condition("skillnet-5", "dense-5", tasks=[MEAN], beyond=["skillnet-2", "dense-2"])
    rules = ClaimsConfig({"lead": Claim("The lead grows.", [part])})
    made = reporting.build_report(
        compare_runs(runs, "skillnet-5"), "scale", rules, references=REFERENCES
    )
    assert list(made.evidence) == ["differences", reporting.SCALE]
    write_report(made, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    for text in ("Score and cost against the number of tasks", "activated, mean of 2 tasks"):
        assert text in page
    assert "mean score" not in Folds(page.partition("<body>")[2]).text
    rows = read_csv_rows(tmp_path / "report" / "summary.csv")
    (own,) = (row for row in rows if (row["system"], row["task"]) == ("dense-5", "own_mean"))
    # A weight has two columns.
    assert (own["tasks"], float(own["total_params"])) == ("5", 1000)
    figure = tmp_path / "scale.svg"
    draw_study.main([str(tmp_path / "report"), "--scale", "--output", str(figure)])
    assert figure.read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.integration
def test_the_page_fits_wide_narrow_and_printed(page: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    # A frame measures the page, so its policy must not forbid frames; printing is emulated.
    styles = {"wide": 1280, "narrow": 360, "printed": 700}
    for name in styles:
        text = page.replace("@media print", "@media screen") if name == "printed" else page
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
    frames = "".join(
        f'<iframe src="{name}.html" style="width:{width}px;height:900px;border:0"></iframe>'
        for name, width in styles.items()
    )
    script = (
        "onload=()=>{document.title=Array.from(frames,f=>f.document.documentElement.scrollWidth"
        "-f.innerWidth).join()}"
    )
    frame = tmp_path / "frames.html"
    frame.write_text(f"<html><body>{frames}<script>{script}</script></body></html>")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    more = [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files"]
    done = subprocess.run(
        [browser, *words, *more, "--hide-scrollbars", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    # No page is wider than its window: text wraps, and wide tables scroll within their frame.
    assert re.findall(r"<title>(.*)</title>", done.stdout) == ["0,0,0"], done.stderr[-500:]


def test_without_claims_the_best_systems_are_the_table(comparison: SystemComparison) -> None:
    made = reporting.build_report(comparison, "six", references=REFERENCES)
    assert made.answer.startswith("skillnet-pretrained has the highest mean score of 6 systems, ")
    first = made.tables[0]
    assert [row[0].text for row in first.rows] == [
        *("skillnet-pretrained", "skillnet", "moe", "specialist-pretrained", "specialist"),
        "simple references",
    ]
    assert len(made.tables[1].rows) == len(SYSTEMS) + 1


def test_variants_of_a_system_are_adjacent_and_sorted_by_score(comparison, report):
    order = [
        *("skillnet-pretrained", "skillnet", "moe", "specialist-pretrained", "specialist", "dense")
    ]
    assert sort_systems(comparison) == order
    assert list(report.comparison.systems) == order


def test_speech_has_one_direction_in_all_tables(report, page):
    named = 0
    for table in report.tables:
        for place, column in enumerate(table.columns):
            if column.startswith("speech recognition, "):
                named += 1
                assert column == "speech recognition, 1 − token error", table.title
                assert float(table.rows[0][place].text) > 50
    assert named == 2
    assert "token_error_rate" not in page


def test_numbers_stay_whole_at_100_columns(report, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    reporting.show_report(report)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    intervals = re.findall(r"[+−][\d.]+ \([+−][\d.]+ to [+−][\d.]+\)", shown)
    assert len(intervals) >= 3, "each claim has its number in one line"
    table = next(each for each in report.tables if each.title == "Results on held-out rows")
    for row in table.rows:
        for cell in row:
            assert cell.text in shown
            assert cell.small in shown
    assert console.terminal_width(None) == 100


@pytest.mark.slow("test_report_page.py::test_the_answer_the_figures_and_one_short_table_come_first")
def test_the_figure_of_the_documents_is_drawn_from_kept_files(report, tmp_path):
    write_report(report, tmp_path)
    assert draw_study.read_reference(read_csv_rows(tmp_path / "summary.csv")) == pytest.approx(40)
    assert draw_study.main([str(tmp_path), "--notice", "under revision"]) == 0
    drawn = (tmp_path / "evidence.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<svg")
    assert "href" not in drawn.replace('xlink:href="#', "").replace("xmlns:xlink", "")
    figure = draw_study.draw_study_figure(tmp_path, "under revision")
    assert figure.get_suptitle() == "under revision"
    assert "simple references, 40.0" in {text.get_text() for text in figure.axes[1].texts}
    (tmp_path / "claims.json").write_text("[]")
    (tmp_path / "tests.csv").write_text("kind\n")
    with pytest.raises(ValueError, match="at least two systems"):
        draw_study.draw_study_figure(tmp_path)


def test_references_are_measured_on_the_corpora_of_the_runs(tmp_path: Path) -> None:
    readable_corpora.write_corpora(tmp_path / "corpora")
    (folder,) = write_study(tmp_path, {"skillnet": 0.5}, seeds=(0,))
    # Synthetic runs name other corpora, whose references are unknown.
    assert find_reference_scores(compare_runs([read_run(folder)])) == {}
    (folder / "result.json").write_text("{}")
    found = find_reference_scores(compare_runs([read_run(folder)]))
    assert set(found) >= {(task, "test") for task in TASKS}
    assert all(0 <= score <= 1 for score in found.values())
    rows = evaluate_simple_baselines(tmp_path / "corpora", bootstrap_samples=0)
    assert found == collect_reference_scores(rows)
    # A kept study has a file with them and no corpora, and only for its own test rows.
    run = read_run(folder)
    (tmp_path / "study").mkdir()
    kept = replace(run, folder=tmp_path / "study/runs/skillnet", settings={})
    assert find_reference_scores(compare_runs([kept])) == {}
    references = build_references(found, compare_runs([kept]))
    write_document(tmp_path / "study", REFERENCES_FILE, references)
    assert find_reference_scores(compare_runs([kept])) == pytest.approx(found)
    other = replace(kept, settings={"fold": {"count": 2}})
    assert find_reference_scores(compare_runs([other])) == {}
    # Rows of an evaluation come first.
    row = dict(run.rows[0]) | {"system": "simple_baseline", "value": 0.25}
    measured = compare_runs([replace(run, rows=[*run.rows, row])])
    assert find_reference_scores(measured) == {("text_classification", "test"): 0.25}


def test_corpora_without_raw_texts_do_not_cost_the_report(tmp_path: Path, capsys) -> None:
    small_corpora.write_corpora(tmp_path / "corpora")
    (folder,) = write_study(tmp_path, {"skillnet": 0.5}, seeds=(0,))
    (folder / "result.json").write_text("{}")
    assert find_reference_scores(compare_runs([read_run(folder)])) == {}
    assert "the report has no simple references" in capsys.readouterr().err


def test_the_evidence_is_drawn_from_the_kept_rows(report: reporting.ComparisonReport) -> None:
    claims = build_claim_rows(report.claims)
    groups = group_claims(claims)
    assert [len(group.rows) for group in groups] == [5, 5, 4]
    assert {row.band for row in groups[0].rows} == {(-0.02, 0.0)}
    assert groups[0].note == "holds: skillnet-pretrained − specialist-pretrained"
    tests = build_test_rows(report.comparison)
    # Six pairs: only their means are listed, as reference less other.
    (means,) = group_tests(tests)
    assert len(means.rows) == 6
    assert "skillnet-pretrained − specialist-pretrained" in {row.label for row in means.rows}
    dense = next(row for row in means.rows if row.label == "skillnet − dense")
    assert dense.result == "higher"
    assert dense.change[1] < dense.change[0] < dense.change[2]
    points = collect_points(build_summary_rows(report.comparison))
    assert {point.label for point in points} == set(SYSTEMS)
    figure = draw_joint_evidence(groups, points, 40.0, "under revision")
    left, right = figure.axes
    assert "(log axis)" in right.get_xlabel()
    assert right.get_xscale() == "log"
    assert {text.get_text() for text in right.texts} >= set(SYSTEMS)
    assert left.get_yticklabels()[0].get_text() == "text classification"


@pytest.mark.parametrize("tasks", [["a"], ["a", "b"], ["a", "b", "mean"]])
def test_many_pairs_are_drawn_with_and_without_a_mean(tasks: list[str]) -> None:
    row = {"kind": "system", "against": "skillnet", "difference": 0.1, "low": 0.0, "high": 0.2}
    tests = [
        row | {"system": f"s{n}", "task": task, "verdict": "lower"}
        for n in range(6)
        for task in tasks
    ]
    (group,) = group_tests(tests)
    labels = [each.label for each in group.rows]
    wanted = ["skillnet − s0, a", "skillnet − s0, b"] if tasks == ["a", "b"] else ["skillnet − s0"]
    assert labels[: len(wanted)] == wanted
    assert len(labels) == 6 * len(wanted)
    assert {each.result for each in group.rows} == {"higher"}


def test_a_study_of_few_labels_without_specialists(tmp_path: Path) -> None:
    paths = write_study(tmp_path, {"skillnet": 0.5, "dense": 0.0}, seeds=(0, 1, 2))
    runs = [read_run(path) for path in paths]
    few = {"tasks": {TASKS[0]: {"label_fraction": 0.1}, TASKS[1]: None}}
    comparison = compare_runs(
        label_runs([replace(run, settings={**run.settings, **few}) for run in runs])
    )
    scores = {(task, "test"): 0.5 for task in TASKS}
    table = reporting.build_report(comparison, "x", references=scores).tables[0]
    assert table.columns[-1] == "mean score"
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert "divided by the mean score of" not in table.caption
    assert "trained on all labelled training rows" in table.caption


# -- budgets until dense's score -----------------------------------------------------------


def test_a_crossing_is_interpolated() -> None:
    curve = [(10, 0.2), (20, 0.4), (30, 0.3), (40, 0.6)]
    assert find_crossing(curve, 0.3) == pytest.approx(15)
    assert find_crossing(curve, 0.1) == 10
    assert find_crossing(curve, 0.7) is None


def test_a_ratio_is_a_geometric_mean_with_an_interval() -> None:
    found = estimate_ratio([0.5, 2.0])
    assert found.value == pytest.approx(1.0)
    assert found.low * found.high == pytest.approx(1.0)
    assert estimate_ratio([0.5, 2.0], is_bound=True).low != estimate_ratio([0.5, 2.0]).low
    # Equal ratios say nothing about their spread: no interval has zero width.
    assert np.isnan(estimate_ratio([0.07, 0.07, 0.07]).low)
    # Two runs whose training rows overlap say as much as one: (1/2 + 1/2) of the variance.
    overlapping = estimate_ratio([0.5, 2.0], test_to_train=0.5)
    assert np.log(overlapping.high) == pytest.approx(2**0.5 * np.log(found.high))


def test_systems_are_timed_until_the_score_of_dense(tmp_path: Path) -> None:
    folders = write_study(tmp_path, {"skillnet": 0.5, "dense": 0.0, "moe": 0.0}, seeds=(0, 1, 2))
    for folder in folders:
        system, seed = folder.name.split("-seed")
        # Dense ends at 0.6, which SkillNet reaches after a third and the mixture never.
        end = {"dense": 0.6, "skillnet": 1.0, "moe": 0.5}[system] - 0.01 * int(seed)
        steps = (0, 4, 12) if system == "skillnet" else (0, 12)
        write_curve(folder, {step: end * min(step / 6.6, 1.0) for step in steps})
    runs = label_runs([read_run(folder) for folder in folders])
    comparison = compare_runs(runs)
    budgets = estimate_budgets(comparison, reporting.read_validation_curves)
    assert set(budgets) == {"skillnet", "dense", "moe"}
    own = budgets["skillnet"]
    assert (own.reached, own.runs, own.is_bound) == (3, 3, False)
    assert own.steps.value == pytest.approx(1 / 3, abs=0.02)
    assert own.steps.low < own.steps.value < own.steps.high
    ratio = comparison.costs["skillnet", MEAN].flops / comparison.costs["dense", MEAN].flops
    assert own.flops.value == pytest.approx(ratio * own.steps.value)
    # A target that is not reached gives a lower bound and no interval.
    assert budgets["moe"].is_bound
    assert budgets["moe"].steps.value == pytest.approx(1.0)
    assert budgets["moe"].steps.low != budgets["moe"].steps.low
    table = next(
        each
        for each in reporting.build_report(comparison, "x").tables
        if each.title == "Budget until dense's final score"
    )
    cells = {row[0].text: [cell.text for cell in row[2:]] for row in table.rows}
    assert cells["moe"][:2] == ["0 of 3", "≥ 1.00"]


def test_budgets_of_folds_are_paired_within_a_fold(tmp_path: Path) -> None:
    runs = []
    for system, folds in (("skillnet", (1, 2, 3)), ("dense", (0, 1, 2, 3))):
        for number in folds:
            folder = write_run(tmp_path / f"{system}{number}", system)
            set_fold(folder, FoldConfig(4, number))
            # The folds differ by more than the systems.
            write_curve(folder, {0: 0.0, 12: 0.2 * (1 + number)})
            runs.append(read_run(folder, system))
    own = estimate_budgets(compare_runs(runs), reporting.read_validation_curves)["skillnet"]
    assert (own.reached, own.runs) == (3, 3)
    assert own.steps.value == pytest.approx(1.0)
