"""Finished runs: reading, grouping, comparison, and the verdicts of claims."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from skillnet_platform.errors import UserError
from sweeps.analysis import claims as cl
from sweeps.analysis.comparison import MEAN, SystemComparison, compare_systems
from sweeps.analysis.finished_runs import find_differing_settings, find_run, label_runs, read_run
from sweeps.analysis.format import format_signed_points
from sweeps.config.study import ClaimsConfig
from sweeps.report import report as reporting
from sweeps.report.html import render_report
from sweeps.report.tables import build_score_table, build_settings_table, build_tables
from tests.helpers.synthetic_runs import TASKS, write_pretraining, write_run, write_study


def compared(root: Path, systems: dict, **more) -> SystemComparison:
    return compare_systems(
        label_runs([read_run(path) for path in write_study(root, systems, **more)])
    )


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> SystemComparison:
    """Build a comparison where SkillNet leads, more so if pretrained, and dense is last."""
    systems = {
        "skillnet": 0.6,
        "skillnet-pretrained": 1.4,
        "specialist": 0.0,
        "specialist-pretrained": 0.5,
        "dense": -0.3,
        "moe": -0.2,
    }
    return compared(tmp_path_factory.mktemp("clear"), systems)


def verdicts(of: SystemComparison, config: ClaimsConfig | None = None) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in cl.evaluate_claims(of, config)}


def test_estimates_are_means_over_the_seeds_of_the_runs(clear: SystemComparison):
    for label, runs in clear.systems.items():
        for task in TASKS:
            values = [r["value"] for run in runs for r in run.rows if r["task"] == task]
            wanted = 1 - np.mean(values) if task == "speech_recognition" else np.mean(values)
            found = clear.scores[label, task, "test"]
            assert found.value == pytest.approx(wanted, abs=1e-5)
            assert found.low < found.value < found.high
        mean = np.mean([clear.scores[label, task, "test"].value for task in TASKS])
        assert clear.scores[label, MEAN, "test"].value == pytest.approx(mean)


def test_relative_scores_use_specialists_of_the_same_pretraining(clear: SystemComparison):
    assert clear.relative["specialist"].value[:3] == (1, 1, 1)
    assert clear.relative["skillnet"].against == "specialist"
    assert clear.relative["skillnet-pretrained"].against == "specialist-pretrained"
    by_hand = np.mean(
        [
            clear.samples["skillnet", task, "test"].values
            / clear.samples["specialist", task, "test"].values
            for task in TASKS
        ]
    )
    found = clear.relative["skillnet"].value
    assert found.value == pytest.approx(by_hand)
    assert 1 < found.low < found.high


def test_tests_cover_each_system_once_and_are_corrected_together(clear: SystemComparison):
    pairs = {(t.kind, t.system, t.against) for t in clear.tests}
    assert pairs == {
        ("system", "specialist", "skillnet"),
        ("system", "specialist-pretrained", "skillnet-pretrained"),
        ("system", "dense", "skillnet"),
        ("system", "moe", "skillnet"),
        ("pretraining", "skillnet-pretrained", "skillnet"),
        ("pretraining", "specialist-pretrained", "specialist"),
    }
    assert len(clear.tests) == len(pairs) * (len(TASKS) + 1)
    assert all(test.p_corrected >= test.p for test in clear.tests)
    smallest = min(clear.tests, key=lambda test: test.p)
    assert smallest.p_corrected == pytest.approx(min(1, len(clear.tests) * smallest.p))
    dense = clear.find_test("dense", "skillnet", MEAN)
    assert dense is not None
    assert dense.is_significant
    assert dense.difference.high < 0


def test_claims_hold_with_a_large_difference(clear: SystemComparison):
    assert verdicts(clear) == {
        "the specialists": "holds",
        "the specialists, pretrained": "holds",
        "pretraining": "holds",
        "text to image": "holds",
        "equal activated cost": "holds",
    }
    assert {claim.winner for claim in cl.evaluate_claims(clear)} == {
        "skillnet",
        "skillnet-pretrained",
    }
    assert verdicts(clear, ClaimsConfig(relative=5.0))["the specialists"] == "does not hold"


def test_claims_are_refuted_by_a_clear_loss(tmp_path: Path):
    lost = {"text_to_image": -0.9, "text_to_code": 0.4}
    found = compared(tmp_path, {"skillnet": lost, "specialist": 0.0, "dense": 0.6, "moe": 0.9})
    claims = {claim.name: claim for claim in cl.evaluate_claims(found)}
    assert claims["the specialists"].verdict == "does not hold"
    assert claims["text to image"].verdict == "does not hold"
    assert claims["text to image"].winner == "moe"
    assert claims["equal activated cost"].verdict == "does not hold"
    assert claims["equal activated cost"].winner == "moe"
    assert claims["pretraining"].verdict == "not decided"
    assert claims["pretraining"].undecided_reason == "skillnet-pretrained not run"


def test_nothing_is_decided_for_equal_systems_or_two_seeds(tmp_path: Path):
    found = compared(tmp_path / "equal", {"skillnet": 0.0, "specialist": 0.0, "dense": 0.0})
    claims = {
        claim.name: claim
        for claim in cl.evaluate_claims(found, ClaimsConfig(relative=1.0, margin=0.0))
    }
    assert claims["the specialists"].verdict == "not decided"
    assert claims["the specialists"].winner is None
    assert claims["equal activated cost"].undecided_reason.startswith("no moe within 10 %")
    two = compared(tmp_path / "two", {"skillnet": 1.5, "specialist": 0.0}, seeds=(0, 1))
    claim = cl.evaluate_claims(two)[0]
    assert claim.verdict == "not decided"
    assert claim.undecided_reason.startswith("2 seeds per system")
    assert len(claim.conditions) == len(TASKS) + 1


def test_a_non_inferiority_claim_has_no_winner(tmp_path: Path):
    found = compared(tmp_path, {"skillnet": 0.01, "specialist": 0.0})
    claim = cl.evaluate_claims(found, ClaimsConfig(relative=0.5, margin=0.5))[0]
    assert (claim.verdict, claim.winner, claim.winner_text) == ("holds", None, "no winner")
    made = reporting.build_report(found, "alike", ClaimsConfig(relative=0.5, margin=0.5))
    first = re.search(r"<article.*?</article>", render_report(made), re.DOTALL)
    assert first is not None
    assert "Winner: no winner" in first.group()
    assert "| holds | no winner |" in reporting.report_to_markdown(made)


def test_a_specialist_with_score_zero_leaves_the_relative_score_unknown(tmp_path: Path):
    found = compared(tmp_path, {"skillnet": 0.5, "specialist": {"text_to_code": -50.0}})
    assert np.isnan(found.relative["skillnet"].value.value)
    claim = cl.evaluate_claims(found)[0]
    assert claim.verdict == "not decided"
    assert claim.conditions[-1].text.startswith("mean relative score unknown")
    rows = build_score_table(found).rows
    assert [row[-1].text for row in rows] == ["–", "–"]
    assert "nan" not in "".join(
        cell.text for table in build_tables(found) for r in table.rows for cell in r
    )


def test_a_larger_model_does_not_win_at_equal_cost(tmp_path: Path):
    paths = write_study(tmp_path, {"skillnet": 0.5}, activated=1500)
    paths += write_study(tmp_path, {"dense": -0.5, "specialist": -0.5}, activated=1000)
    found = compare_systems(label_runs([read_run(path) for path in paths]))
    claims = {claim.name: claim for claim in cl.evaluate_claims(found)}
    assert claims["text to image"].verdict == "does not hold"
    assert "1.50 of its activated parameters" in claims["text to image"].conditions[0].text
    assert claims["equal activated cost"].verdict == "not decided"


def test_a_missing_task_keeps_the_others(tmp_path: Path):
    write_study(tmp_path, {"skillnet": 0.5, "specialist": 0.0}, seeds=(0, 1, 2))
    write_study(tmp_path, {"dense": 0.0}, seeds=(0, 1, 2), tasks=TASKS[:2])
    found = compare_systems(
        label_runs([read_run(path) for path in sorted(tmp_path.glob("*-seed*"))])
    )
    assert list(found.tasks) == list(TASKS)
    assert list(found.common_tasks) == list(TASKS[:2])
    assert found.find_score("dense", "text_to_image") is None
    assert found.find_test("dense", "skillnet", "text_to_image") is None
    with pytest.raises(UserError, match="no task in common"):
        write_run(tmp_path / "other", "moe", tasks=TASKS[3:])
        runs = [read_run(tmp_path / "other"), read_run(tmp_path / "dense-seed0")]
        compare_systems(label_runs(runs))


def test_differences_have_signs():
    assert [format_signed_points(x) for x in (0.0123, -0.0123, -0.0, -0.0001)] == [
        "+1.2",
        "−1.2",
        "+0.0",
        "+0.0",
    ]


def test_one_seed_and_one_system_give_a_table(tmp_path: Path):
    found = compared(tmp_path, {"skillnet": 0.0}, seeds=(3,))
    assert found.seeds == 1
    assert not found.tests
    assert found.scores["skillnet", MEAN, "test"].low > 0
    assert set(verdicts(found).values()) == {"not decided"}
    with pytest.raises(UserError, match="no finished runs"):
        compare_systems([])


# -- reading runs --------------------------------------------------------------------------


def test_runs_of_other_settings_get_other_labels(tmp_path: Path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", "dense", seed, options={"width": "activated"})
        write_run(tmp_path / f"b{seed}", "dense", seed, options={"width": "total"})
    runs = [read_run(tmp_path / name) for name in ("a0", "b0", "a1", "b1")]
    named = label_runs(runs)
    assert [(run.label, run.seed) for run in named] == [
        ("dense", 0),
        ("dense", 1),
        ("dense-2", 0),
        ("dense-2", 1),
    ]
    assert "dense-2: dense with other settings" in capsys.readouterr().err
    assert {run.label for run in label_runs(runs, ["narrow", "wide"])} == {"narrow", "wide"}
    assert find_differing_settings(named) == {
        "options.width": {"dense": "activated", "dense-2": "total"}
    }
    with pytest.raises(UserError, match=r"1 names for 2 configurations: dense \(2 runs\)"):
        label_runs(runs, ["narrow"])
    with pytest.raises(UserError, match="names must differ"):
        label_runs(runs, ["same", "same"])
    with pytest.raises(UserError, match="seed 0 occurs twice"):
        label_runs([runs[0], runs[0]])


def pretrained_runs(root: Path) -> list[Path]:
    """Write two seeds of two configurations; each run has its own pretraining."""
    return [
        write_run(
            root / f"{name}{seed}",
            seed=seed,
            pretrained=True,
            start=write_pretraining(root / f"before-{name}{seed}", seed, lr=rate),
        )
        for name, rate in (("a", 0.1), ("b", 0.2))
        for seed in (0, 1)
    ]


def test_different_pretrainings_are_different_systems(tmp_path: Path, capsys):
    runs = [read_run(path) for path in pretrained_runs(tmp_path)]
    assert [run.pretraining_seconds for run in runs] == [4.0] * 4, (
        "includes the time before the resume"
    )
    named = label_runs(runs)
    assert [(run.label, run.seed) for run in named] == [
        ("skillnet-pretrained", 0),
        ("skillnet-pretrained", 1),
        ("skillnet-pretrained-2", 0),
        ("skillnet-pretrained-2", 1),
    ]
    rates = {"skillnet-pretrained": "0.1", "skillnet-pretrained-2": "0.2"}
    assert find_differing_settings(named) == {"pretraining.training.lr": rates}
    write_run(tmp_path / "plain")
    plain = replace(read_run(tmp_path / "plain"), label="skillnet")
    rows = find_differing_settings([plain, *named])
    assert rows == {"pretraining.training.lr": rates | {"skillnet": "–"}}
    caption = build_settings_table(compare_systems([plain, *named])).caption
    assert "The same holds for the pretrainings" in caption
    assert "unknown" not in caption


def test_an_unknown_pretraining_counts_as_the_only_known_one(tmp_path: Path):
    folders = pretrained_runs(tmp_path)
    shutil.rmtree(tmp_path / "before-a1")
    runs = [read_run(path) for path in folders]
    assert [run.label for run in label_runs(runs[:2])] == ["skillnet-pretrained"] * 2
    assert len({run.label for run in label_runs(runs)}) == 3, "it may be of either"
    shutil.rmtree(tmp_path / "before-a0")
    alone = label_runs([read_run(path) for path in folders[:2]])
    assert {run.label for run in alone} == {"skillnet-pretrained"}
    caption = build_settings_table(compare_systems(alone)).caption
    assert "The pretraining settings of skillnet-pretrained are unknown." in caption


def test_runs_on_different_rows_or_corpora_are_rejected(tmp_path: Path):
    write_run(tmp_path / "a", "skillnet")
    write_run(tmp_path / "b", "dense", rows=199)
    one, other = read_run(tmp_path / "a"), read_run(tmp_path / "b")
    with pytest.raises(
        UserError, match=r"different rows of text_classification test \(199 and 200"
    ):
        compare_systems([one, other])
    altered = replace(one, digests={"headings": "c" * 64}, label="dense")
    with pytest.raises(UserError, match="different versions of the corpus headings"):
        compare_systems([one, altered])


def test_a_run_is_read_from_its_files(tmp_path: Path, run_root: Path):
    write_run(tmp_path / "a", "moe", 4, pretrained=True, activated=70)
    path = tmp_path / "a"
    run = read_run(path)
    assert (run.label, run.seed, run.total_params, run.seconds) == ("moe-pretrained", 4, 140, 7.5)
    trained = json.loads((path / "trained.json").read_text())
    (path / "trained.json").write_text(json.dumps(trained | {"resumed": 6}))
    assert read_run(path).seconds == 15.0
    assert find_run(str(path)) == path
    write_run(run_root / "named", "moe")
    assert find_run("named") == run_root / "named"
    with pytest.raises(UserError, match="no folder and no run in"):
        find_run("nowhere")
    (path / "outcomes.parquet").unlink()
    with pytest.raises(UserError, match=r"has no outcomes\.parquet"):
        read_run(path)


def test_a_damaged_table_is_rejected_with_its_line(tmp_path: Path):
    path = write_run(tmp_path / "a") / "evaluation.csv"
    text = path.read_text()
    lines = text.splitlines()
    cells = lines[1].split(",")
    cells[5] = "high"
    path.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
    with pytest.raises(UserError, match="line 2: value is 'high'"):
        read_run(tmp_path / "a")
    path.write_text(text.replace("metric,", "measure,", 1))
    with pytest.raises(UserError, match="line 2 has no metric"):
        read_run(tmp_path / "a")
