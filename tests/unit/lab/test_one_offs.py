"""One test of each one-off measurement: it starts, and its numbers follow from its inputs."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.measure import append_csv_rows, read_csv_rows
from lab import RESULTS, equal_versions, fold_coverage, merge_demonstration, published_start
from lab.merge_demonstration import ArmRun
from lab.method_trials import COLUMNS, summarize_trials
from lab.rate_trials import build_rate_trials
from lab.study_coverage import StudyDesign, measure_design, measure_studies, read_tasks
from lab.task_arms import list_length_arms
from pipelines import prepare
from pipelines.data.shards.dataset import open_corpus
from pipelines.training.evaluation.outcomes import OutcomeTable
from plugins.studies.tests.kept_studies import keep_study
from skillnet_studies.analysis.finished_runs import EQUAL_VERSIONS, read_equal_versions
from skillnet_studies.study.kept_results import TUNING, KeptStudy, open_study
from tests.helpers.prepared_corpora import write_corpus
from tests.helpers.user_corpora import write_lines
from tools.docs import published_start_tables
from tools.docs.merge_tables import merge_page_text, newest_merge

#: Rows of a task of the demonstration of merging, and the metric of each task.
ROWS, KEYS = 40, {"text_to_code": "recall_at_10", "stroke_count": "accuracy"}


def write_trials(path: Path) -> None:
    values = {
        ("configured", 0): (0.9, 0.3),
        ("configured", 1): (0.9, 0.5),
        ("aligned", 1): (0.4, 0.2),
    }
    for (arm, seed), pair in values.items():
        common = {"task": "t", "arm": arm, "seed": seed, "average": 0.0, "steps": 20}
        rows = [common | {"step": 10 * (n + 1), "value": v} for n, v in enumerate(pair)]
        append_csv_rows(path, COLUMNS, rows)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    write_trials(tmp_path / "a.csv")
    rows = read_csv_rows(tmp_path / "a.csv")
    assert summarize_trials(rows, 0.4) == [
        ("configured", "0.0", "0.300, 0.500", "0.400", "0.141", "–", "20, inf"),
        ("aligned", "0.0", "0.200", "0.200", "–", "-0.300 (one seed)", "10"),
    ]


def test_a_rate_of_a_study_has_the_trial_of_the_study() -> None:
    final = RESULTS / "final"
    kept = [
        entry["settings"] | {"steps": entry["step"]}
        for entry in KeptStudy(final).content[TUNING]
        if entry["name"].startswith("specialist-r") and entry["settings"]["training.lr"] == 4e-3
    ]
    trials = build_rate_trials(final, "specialist", [4e-3, 8e-3])
    assert [(t.config.seed, t.config.fold.number) for t in trials] == 2 * [(1000, 0), (1001, 1)]
    same, higher = trials[0], trials[2]
    assert {**same.settings, "steps": same.config.training.steps} in kept
    assert higher.settings == same.settings | {"training.lr": 8e-3}
    assert higher.config.training.lr == 8e-3
    assert higher.splits == ("validation",)


def test_lengths_differ_in_tokens_or_in_steps() -> None:
    options = argparse.Namespace(data=Path("corpora"), steps=250, longer=2.0, lr=1.5e-3)
    options.max_length = 192
    arms = list_length_arms(options)
    runs = [arm.finetuning for arm in arms.values()]
    sizes = [(run.tasks["text_to_code"].max_length, run.training.steps) for run in runs]
    assert sizes == [(96, 250), (192, 250), (96, 500)]
    for run in runs:
        assert replace(run, tasks=runs[0].tasks, training=runs[0].training) == runs[0]


def make_run(arm: str, seed: int, hits: dict[str, int], is_identical: bool | None = None) -> ArmRun:
    """Return an arm with the given right answers of ``ROWS`` per task, two rows per unit."""
    outcomes, rows = OutcomeTable(), []
    for task, count in hits.items():
        answers = np.arange(ROWS) < count
        outcomes.add(task, "test", answers, np.ones(ROWS), unit=np.arange(ROWS) // 2)
        row: dict[str, Any] = {"task": task, "split": "test", "metric": KEYS[task]}
        row |= {"value": count / ROWS, "low": 0.0, "high": 1.0, "activated_params": 7}
        row |= {"date": "2026-01-02", "machine": "a machine, 2 cores"}
        rows += [row, row | {"metric": "macro_f1"}, row | {"split": "validation"}]
    identical = {} if is_identical is None else dict.fromkeys(outcomes, is_identical)
    return ArmRun(arm, seed, rows, outcomes, 300, "f" * 64, identical)


def list_runs() -> list[ArmRun]:
    """Return two seeds, the second of which was stopped before its last arm."""
    found = []
    for seed in (0, 1):
        found += [
            make_run("base", seed, {"text_to_code": 20}),
            make_run("merged", seed, {"text_to_code": 20, "stroke_count": 30 + seed}, True),
            make_run("joint", seed, {"text_to_code": 20, "stroke_count": 28}),
        ]
    return [*found, make_run("averaged", 0, {"text_to_code": 10, "stroke_count": 6}, False)]


def test_a_part_of_the_arms_is_written_and_stated(tmp_path: Path) -> None:
    folder = tmp_path / "2026-01-02-merge"
    merge_demonstration.write_results(list_runs()[:1], folder)
    merge_demonstration.write_results(list_runs(), folder)
    scores = read_csv_rows(folder / merge_demonstration.SCORES)
    assert len(scores) == 2 * (1 + 2 + 2) + 2
    assert {row["metric"] for row in scores} == set(KEYS.values())
    assert {row["is_identical"] for row in scores if row["arm"] == "merged"} == {"True"}
    assert {row["is_identical"] for row in scores if row["arm"] == "joint"} == {""}
    summary = {
        (row["arm"], row["task"]): row
        for row in read_csv_rows(folder / merge_demonstration.SUMMARY)
    }
    # Equal outcomes have no difference to estimate.
    assert summary["joint", "text_to_code"]["difference"] == ""
    assert float(summary["averaged", "text_to_code"]["difference"]) == 10 / ROWS
    joint = summary["joint", "stroke_count"]
    assert float(joint["value"]) == 28 / ROWS
    assert float(joint["difference"]) == pytest.approx(2.5 / ROWS)
    assert float(joint["difference_low"]) < 2.5 / ROWS < float(joint["difference_high"])

    assert newest_merge(tmp_path) == folder
    lines = merge_page_text(folder).splitlines()
    assert lines[0].startswith("300 steps per new task, growth seeds 0, 1, one base (digest ffff")
    assert "- After merging, 4 of 4 outputs" in "\n".join(lines)
    assert "- After averaging, 0 of 2 outputs" in "\n".join(lines)
    assert "| arm | seeds | `stroke_count`, accuracy | merged minus this |" in lines
    assert any(line.startswith("| **merged** | 2 | 76.2 % (") for line in lines)
    assert any(line.startswith("| averaged | 1 | 15.0 % (") for line in lines)
    assert "| `text_to_code`, R@10 | 50.0 % | 25.0 % |" in lines
    assert "the score of the base in every seed: `merged`, `joint`." in "\n".join(lines)


def test_intervals_by_unit_cover_and_those_of_independent_rows_do_not() -> None:
    tasks = {"text_classification": read_tasks()["text_classification"]}
    found = {
        has_units: measure_design(tasks, StudyDesign((5,) * 9, has_units), 40)
        for has_units in (True, False)
    }
    assert found[True][0]["coverage"] > 85
    assert found[False][0]["coverage"] < 70
    assert found[False][0]["false_alarms"] > 2 * found[True][0]["false_alarms"]


def test_shared_training_rows_beyond_the_assumed_effect_cause_false_alarms() -> None:
    name, found = "text_to_code", {}
    tasks = {name: fold_coverage.read_folds()[name]}
    for effect in (0.0, 4.0):
        random, design = np.random.default_rng(0), fold_coverage.FoldDesign(effect)
        studies = (fold_coverage.draw_folded_study(tasks, design, random) for _ in range(60))
        truths = {name: tasks[name].task}
        found[effect] = measure_studies(studies, truths, fold_coverage.FOLD_PAIRS, "")[0]
    assert found[0.0]["coverage"] > 95
    assert found[0.0]["false_alarms"] < 3
    assert found[4.0]["false_alarms"] > 6


def write_version(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Write a corpus of one shard whose features are changed."""
    features = change(np.linspace(0, 1, 12, dtype=np.float32))
    frames = pa.FixedSizeListArray.from_arrays(pa.array(features), 2)
    mel = pa.ListArray.from_arrays(pa.array([0, 1, 4, 6], pa.int32()), frames)
    splits = {"train": [pa.table({"key": ["a", "b", "c"], "log_mel": mel})]}
    about = {"modality": "sound", "task": "speech", "pretraining": [], "symbols": ["a"]}
    return write_corpus(folder, splits, corpus="voices", **about)


def shift_first(by: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.concatenate([values[:1] + np.float32(by), values[1:]])


@pytest.mark.parametrize("is_kept", [False, True])
def test_rounding_errors_are_recorded_and_larger_differences_rejected(
    tmp_path: Path, is_kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    study = keep_study(tmp_path, "s", {"skillnet": 0.5}) if is_kept else tmp_path
    one = write_version(tmp_path / "one", lambda values: values)
    near = write_version(tmp_path / "near", shift_first(1e-9))
    far = write_version(tmp_path / "far", shift_first(0.1))
    assert equal_versions.main([str(one), str(far), "--output", str(study)]) == 1
    assert "these are different data" in capsys.readouterr().err
    assert read_equal_versions(open_study(study)) == {}
    for _ in range(2):
        assert equal_versions.main([str(one), str(near), "--output", str(study)]) == 0
    (pair,) = json.loads((open_study(study) / EQUAL_VERSIONS).read_text())["pairs"]
    assert (pair["rows"], pair["values"], pair["different"]) == (3, 12, 1)
    digests = [open_corpus(path).digest for path in (one, near)]
    assert read_equal_versions(open_study(study)) == {digests[1]: digests[0]}


def write_bert(folder: Path) -> None:
    """Write a tiny BERT with a tokenizer of a few words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", *"abcdefgh", "def", "return"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), intermediate_size=8, **sizes)
    transformers.BertModel(config).save_pretrained(folder)


def test_a_published_start_trains_each_arm_once_and_its_page_follows(
    tmp_path: Path, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bert(tmp_path / "bert")
    letters = "abcdefgh"
    rows = [
        {
            "docstring": f"{letters[n % 8]} {letters[n // 8]} return",
            "code": f"def {letters[n % 8]}({letters[n // 8]}):\n    return {n}",
            "split": ("train", "train", "validation", "test")[n % 4],
        }
        for n in range(48)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    words = ["--corpus", f"pairs=folder:{tmp_path / 'rows.jsonl'}", "--tokenizer"]
    assert prepare.main([*words, str(tmp_path / "bert"), "--data", str(tmp_path / "data")]) == 0
    monkeypatch.setattr(published_start, "CORPUS", "pairs")
    results = tmp_path / "2026-12-01-published-start"
    words = [str(tmp_path / "bert"), "--data", str(tmp_path / "data"), "--output", str(results)]
    words += ["--steps", "2", "--batch", "4", "--seeds", "0", "1"]
    assert published_start.main(words) == 0
    trials = read_csv_rows(results / published_start.TRIALS)
    assert len({(r["arm"], r["lr"], r["seed"]) for r in trials}) == len(trials) == 1 + 6 + 3
    # Nothing is left to train, so the same command trains nothing.
    monkeypatch.setattr(published_start, "train_arm", None)
    assert published_start.main(words) == 0
    assert read_csv_rows(results / published_start.TRIALS) == trials
    ranks = read_csv_rows(results / published_start.RANKS)
    own = [float(r["rank"]) <= 1 for r in ranks if r["arm"] == published_start.UNTRAINED]
    page = published_start_tables.render_page(results)
    assert f"| the checkpoint, not trained | – | {100 * np.mean(own):.1f} (" in page
    assert "2 steps of 4 pairs, 64 tokens of a function, seeds 0, 1; 12 test functions" in page
