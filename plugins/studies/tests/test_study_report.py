"""The report of a comparison: a self-contained page, and files that agree with it."""

import base64
import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.training.evaluation.tables import COLUMNS
from skillnet_evidence.cells import TableCell
from skillnet_evidence.comparison import MEAN
from skillnet_evidence.figures import draw_learning_figure, draw_plots
from skillnet_evidence.format import (
    format_count,
    format_duration,
    format_p_value,
    format_signed_points,
)
from skillnet_evidence.tables import build_score_table
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend
from skillnet_studies import compare as command
from skillnet_studies.analysis.finished_runs import compare_runs, label_runs, read_run
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.interpret import InterpretConfig
from skillnet_studies.report import report as report_report
from skillnet_studies.report.report import ComparisonReport, write_report
from skillnet_studies.study.tuning import TuningResult
from tests.helpers.synthetic_runs import TASKS, paper_claims, write_study

SYSTEMS = {
    "skillnet": 0.5,
    "skillnet-pretrained": 1.2,
    "specialist": 0.0,
    "specialist-pretrained": 0.2,
    "dense": -0.6,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_study(tmp_path_factory.mktemp("runs"), SYSTEMS, seeds=(0, 1, 2))


@pytest.fixture(scope="module")
def written(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ComparisonReport:
    made = report_report.build_report(
        compare_runs(label_runs([read_run(f) for f in folders])), "five systems", paper_claims()
    )
    write_report(made, tmp_path_factory.mktemp("report"))
    return made


class Links(HTMLParser):
    """Collects the links, tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.targets += [value for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.text += data


def page_of(report: ComparisonReport) -> str:
    assert report.folder is not None
    return (report.folder / "report.html").read_text(encoding="utf-8")


def test_the_page_is_self_contained(written: ComparisonReport):
    page = page_of(written)
    found = Links(page)
    assert "script" not in found.tags
    assert "link" not in found.tags
    inside = [target for target in found.targets if target.startswith("data:image/svg+xml;base64,")]
    assert len(inside) == len(written.evidence) + len(written.figures) == 4
    assert all(t.startswith("#") for t in found.targets if t not in inside)
    assert "url(" not in page
    assert "@import" not in page
    for target in inside:
        drawing = base64.b64decode(target.partition(",")[2]).decode()
        links = re.findall(r"(?:href|src)=\"([^\"]*)\"", drawing)
        assert all(link.startswith("#") for link in links)
        assert "<script" not in drawing
        # All URLs are names of XML namespaces.
        names = re.findall(r"xmlns(?::\w+)?=\"([^\"]*)\"", drawing)
        assert set(re.findall(r"https?://[^\s\"<>]+", drawing)) <= set(names)


def test_external_text_is_escaped(folders: list[Path], tmp_path: Path):
    bad = "<img src=x onerror=alert(1)>$x_{$ & \"'"
    names = [f"{bad}{place}" for place in range(len(SYSTEMS))]
    of = compare_runs(label_runs([read_run(f) for f in folders], names), names[0], names[2])
    made = report_report.build_report(of, bad, facts={bad: bad})
    made.texts[bad] = bad
    made.captions["scores"] = bad
    write_report(made, tmp_path)
    page = page_of(made)
    assert "<img src=x" not in page
    found = Links(page)
    assert found.text.count(bad) > 20
    assert all(target.startswith(("#", "data:")) for target in found.targets)
    with (tmp_path / "summary.csv").open(encoding="utf-8", newline="") as stream:
        assert {row["system"] for row in csv.DictReader(stream)} == set(names)


def test_files_agree_with_the_comparison(written: ComparisonReport):
    of, folder = written.comparison, written.folder
    assert folder is not None

    def rows(name: str) -> list[dict[str, str]]:
        with (folder / name).open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))

    results = rows("results.csv")
    assert tuple(results[0]) == COLUMNS
    assert len(results) == len(of.runs) * len(TASKS)
    assert {row["system"] for row in results} == set(SYSTEMS)
    summary = {(r["system"], r["task"], r["metric"]): r for r in rows("summary.csv")}
    for (label, task, _), found in of.scores.items():
        metric = of.metrics[task].name if task in of.metrics else "score"
        row = summary[label, task, metric]
        assert float(row["score"]) == pytest.approx(found.value, rel=1e-4)
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    error = summary["dense", "speech_recognition", "token_error_rate"]
    assert float(error["value"]) == pytest.approx(1 - float(error["score"]), abs=1e-5)
    tests = rows("tests.csv")
    assert len(tests) == len(of.tests)
    assert float(tests[0]["p_corrected"]) == pytest.approx(of.tests[0].p_corrected, rel=1e-4)
    claims = json.loads((folder / "claims.json").read_text())
    assert [claim["verdict"] for claim in claims] == [c.verdict for c in written.claims]
    outcomes = pq.read_table(folder / "outcomes.parquet")
    assert outcomes.num_rows == sum(len(r.outcomes[t, "test"]) for r in of.runs for t in TASKS)
    assert outcomes.column_names[:4] == ["system", "seed", "task", "split"]


def test_the_table_marks_significant_and_best_values(written: ComparisonReport):
    table = build_score_table(written.comparison)
    rows = {row[0].text: row for row in table.rows}
    place = 2 + TASKS.index("text_to_image")
    assert rows["dense"][place].mark == "▼"
    assert rows["skillnet"][place].mark == ""
    assert rows["skillnet-pretrained"][place].is_best
    assert [row[place].is_best for row in table.rows].count(True) == 1
    assert rows["specialist"][-1] == TableCell("1")
    assert rows["skillnet"][-1].small.count("–") == 1
    page = Links(page_of(written))
    for title in ("Results on held-out rows", "Gain from pretraining", "Cost", "All tests"):
        assert title in page.text
    for claim in written.claims:
        assert claim.text in page.text


def test_provenance_is_listed(written: ComparisonReport):
    facts = written.facts
    assert facts["seeds"].startswith("skillnet-pretrained: 0, 1, 2")
    assert "headings " + "a" * 64 in facts["corpora (digests)"]
    assert "torch " in facts["software"]
    # Three runs per system have the same rows, which count once; speech counts its symbols.
    rows = facts["test rows, queries or symbols"]
    assert rows.startswith("text classification 200, speech recognition 399,")
    runs = len(written.comparison.runs)
    assert facts["runs by precision"] == f"bf16 {runs // 3}, fp32 {2 * runs // 3}"


def test_plots_name_their_axes(written: ComparisonReport):
    for name, figure in draw_plots(written.comparison).items():
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert any(axes.get_xlabel() or axes.get_ylabel() for axes in shown), name
    panels = {axes.get_title() for axes in written.figures["scores"].axes}
    assert "mean over tasks" in panels
    assert "speech recognition, 1 − token error" in panels


def test_curves_of_learning_are_drawn_over_operations(written: ComparisonReport):
    found, task = written.comparison, TASKS[0]
    cost = found.costs["dense", task]
    dear = cost._replace(flops=3 * cost.flops)
    found = replace(found, costs={**found.costs, ("dense", task): dear})
    history = {f"{task}/validation_{found.metrics[task].name}": [(10, 0.25), (20, 0.5)]}
    figure = draw_learning_figure(found, {"skillnet": [history], "dense": [history]})
    lines = figure.axes[found.tasks.index(task)].get_lines()
    assert [list(line.get_xdata() / cost.flops) for line in lines] == [[10, 20], [30, 60]]


def test_number_formats():
    assert [format_count(x) for x in (950, 4.2e6, 1.25e9, float("nan"))] == [
        "950",
        "4.2 M",
        "1.25 G",
        "–",
    ]
    assert [format_duration(x) for x in (9, 95, 7200)] == ["9 s", "1.6 min", "2.0 h"]
    signed = [format_signed_points(x) for x in (0.0123, -0.0123, -0.0, -0.0001)]
    assert signed == ["+1.2", "−1.2", "+0.0", "+0.0"]
    assert [format_p_value(x) for x in (0.0004, 0.04, float("nan"))] == ["< 0.001", "0.040", "–"]


# -- the command ---------------------------------------------------------------------------


def test_finished_runs_from_the_command_line(folders, tmp_path, monkeypatch, capsys):
    # Twelve runs by the folder of their study, three by their names.
    names = [folder.name for folder in folders]
    entries = [
        {"system": name.rpartition("-seed")[0], "folder": name, "status": "finished"}
        for name in names[:-3]
    ]
    trial = {
        "stage": "space",
        "settings": {},
        "status": "finished",
        "score": 0.5,
        "steps": 6,
        "seconds": 2.0,
    }
    tuned = {"dense": {"label": "dense", "score": 0.5, "trials": [trial]}}
    study = folders[0].parent
    (study / "study.json").write_text(json.dumps({"tuning": tuned, "runs": entries}))
    monkeypatch.setenv("SKILLNET_HOME", str(study))
    arguments = ["--runs", str(study), *names[-3:], "--output", str(tmp_path / "out"), "--json"]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    arguments += ["--config", "claims/paper"]
    assert command.main([*arguments, "--tracking.uri", uri, "--name", "again"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {(run["system"], run["seed"]) for run in printed["runs"]} == {
        (system, seed) for system in SYSTEMS for seed in (0, 1, 2)
    }
    means = [r for r in printed["summary"] if (r["system"], r["task"]) == ("skillnet", MEAN)]
    assert means[0]["low"] < means[0]["score"] < means[0]["high"]
    assert printed["relative"]["skillnet-pretrained"]["against"] == "specialist-pretrained"
    page = Links((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "Every system got 1 trial(s) of 6 steps" in page.text
    client = backend.create_client(uri)
    experiment = client.get_experiment_by_name(backend.STUDY_EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id])
    assert [(run.info.run_name, run.info.status) for run in runs] == [("again", "FINISHED")]
    files = {entry.path for entry in client.list_artifacts(runs[0].info.run_id, "comparison")}
    assert {f"comparison/{name}" for name in ("report.html", "summary.csv")} <= files
    plotted = client.list_artifacts(runs[0].info.run_id, "plots")
    assert "plots/scores.png" in {entry.path for entry in plotted}
    assert runs[0].data.tags["claim.pretrained specialists"] == "holds"
    assert runs[0].data.metrics["skillnet/mean_score"] == pytest.approx(means[0]["score"])


def test_a_planned_study_states_what_it_could_decide(folders: list[Path], capsys):
    arguments = ["--config", "studies/tiny", "--power", ",".join(map(str, folders))]
    assert command.main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["study"] == "tiny-study"
    assert {each["difference"] for each in printed["tests"]} == {
        "skillnet-pretrained − skillnet",
        "dense − skillnet",
    }
    # A larger true difference is shown more often.
    assert all(list(each) == sorted(each) for each in printed["shares"].values())
    assert all(each["detectable"] > each["error"] > 0 for each in printed["tests"])
    assert command.main(arguments) == 0
    assert "with the variances of 15 runs" in capsys.readouterr().out
    folds = ["--run.fold.count", "4", "--folds", "2", "--json"]
    assert command.main([*arguments, *folds]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {each["seeds"] for each in printed["tests"]} == {6}, "three seeds of each fold that runs"


def test_tuning_is_reported_by_the_labels_of_the_report(tmp_path: Path):
    def tuned(score: float) -> dict[str, TuningResult]:
        return {
            "skillnet": TuningResult("skillnet", {"training.lr": score}, score),
            "skillnet-pretrained": TuningResult("skillnet-pretrained", reuse_tuning_of="skillnet"),
            "dense": TuningResult("dense", {}, 0.1),
        }

    one, two = tmp_path / "one", tmp_path / "two"
    runs = [
        (one / "runs" / "a", "skillnet", "skillnet"),
        (one / "runs" / "b", "skillnet-pretrained", "skillnet-pretrained"),
        (two / "runs" / "a", "skillnet", "skillnet-2"),
        (two / "runs" / "b", "skillnet-pretrained", "mine"),
    ]
    made = command.relabel_tuning([(one, tuned(0.5)), (two, tuned(0.7))], runs)
    assert {label: (own.label, own.score) for label, own in made.items()} == {
        "skillnet": ("skillnet", 0.5),
        "skillnet-pretrained": ("skillnet-pretrained", None),
        "dense": ("dense", 0.1),
        "skillnet-2": ("skillnet-2", 0.7),
        "mine": ("mine", None),
    }
    assert made["mine"].reuse_tuning_of == "skillnet-2"
    assert made["skillnet-pretrained"].reuse_tuning_of == "skillnet"
    # Seeds of one system out of two studies, each tuned on its own.
    both = [(one / "runs" / "a", "skillnet", "net"), (two / "runs" / "a", "skillnet", "net")]
    made = command.relabel_tuning([(one, tuned(0.5)), (two, tuned(0.7))], both)
    assert (made["net"].score, made["net (two)"].score) == (0.5, 0.7)


def test_skill_figures_are_written_beside_the_report(folders, tmp_path, monkeypatch):
    asked: list[InterpretConfig] = []

    def refuse(config: InterpretConfig) -> None:
        asked.append(config)
        raise UserError("not now")

    monkeypatch.setattr("skillnet_studies.interpret.interpret_source", refuse)
    runs = [read_run(folder) for folder in folders if folder.name == "skillnet-seed0"]
    (runs[0].folder / "model" / "manifest.json").write_text("{}")
    made = report_report.build_report(compare_runs(runs), "one")
    command._add_skill_figures(made, StudyConfig(runs=["x"]), tmp_path / "report")
    assert [each.output for each in asked] == [str(tmp_path / "report" / "interpretation")]
    assert asked[0].split == "validation"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "nothing to compare"),
        (["--runs", "nowhere"], "no folder and no run in"),
        (["--systems.a.system", "skillnet"], "a study needs a name"),
        (["--config", "studies/headlin"], "neither a file nor a preset"),
        (
            ["--config", "studies/headline", "--systems.moe-pretrained", "null"],
            "claims.stated.mixture of experts: unknown system 'moe-pretrained'",
        ),
        (
            ["--config", "studies/tiny", "--reference", "dens"],
            "--reference: unknown system 'dens'; did you mean 'dense'?",
        ),
        (
            ["--config", "studies/tiny", "--specialist", "specialis"],
            "--specialist: unknown system 'specialis'",
        ),
        (
            ["--config", "studies/tiny", "--specialist", "skillnet"],
            "reference and specialist are both 'skillnet'; name two systems",
        ),
    ],
)
def test_errors_are_one_line(arguments: list[str], expected: str, run_root: Path, capsys):
    assert command.main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert expected in lines[-1]
    assert len([line for line in lines if line.startswith("error")]) == 1
    assert not list(run_root.glob("*.db")), "a run was recorded"


@pytest.mark.parametrize("option", ["--reference", "--specialist"])
def test_an_unknown_role_is_rejected_before_the_report(option, folders, tmp_path, capsys):
    arguments = ["--runs", *map(str, folders), option, "dens", "--output", str(tmp_path / "out")]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert command.main([*arguments, "--tracking.uri", uri]) == 2
    expected = f"{option}: unknown system 'dens'; did you mean 'dense'?"
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_without_a_reference_says_so(capsys):
    command.check_roles(StudyConfig(runs=["x"]), ["dense", "moe", "moe"])
    expected = "no system is named skillnet, so nothing is tested. Give --reference: dense, moe"
    assert expected in " ".join(capsys.readouterr().err.split())
    for labels in (["dense"], ["dense", "skillnet-pretrained"]):
        command.check_roles(StudyConfig(runs=["x"]), labels)
        assert capsys.readouterr().err == ""


def test_runs_and_names_take_several_values():
    assert command.normalize_arguments(["--runs", "a", "b", "--json"]) == ["a", "b", "--json"]
    assert command.normalize_arguments(["--names", "x", "y", "--runs", "a"]) == [
        "--names",
        "x,y",
        "a",
    ]
