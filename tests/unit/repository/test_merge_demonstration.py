"""The demonstration of merging: its joint run, its tables with part of the arms, and its page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import merge_demonstration as demonstration
from benchmarks.merge_demonstration import ArmRun, SeedDemonstration, build_joint_config
from pipelines.training.config.growth import NewSkill
from pipelines.training.evaluation.outcomes import OutcomeTable
from pipelines.training.growth import runs
from pipelines.training.runs import model_source
from skillnet.model import SkillNet
from skillnet.skills import SkillPlan
from tests.helpers.sixth_corpus import grow_config, write_labelled_clips
from tests.helpers.small_corpora import small_config, write_corpora
from tools.docs.kept_results import rows_of
from tools.docs.merge_tables import merge_page_text, newest_merge

ROWS = 40
KEYS = {"text_to_code": "recall_at_10", "stroke_count": "accuracy"}


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


def test_a_part_of_the_arms_is_written_and_reported(tmp_path: Path) -> None:
    folder = tmp_path / "2026-01-02-merge"
    demonstration.write_results(list_runs()[:1], folder)
    demonstration.write_results(list_runs(), folder)
    scores = rows_of(folder / demonstration.SCORES)
    assert len(scores) == 2 * (1 + 2 + 2) + 2
    assert {row["metric"] for row in scores} == set(KEYS.values())
    assert {row["is_identical"] for row in scores if row["arm"] == "merged"} == {"True"}
    assert {row["is_identical"] for row in scores if row["arm"] == "joint"} == {""}
    summary = {(row["arm"], row["task"]): row for row in rows_of(folder / demonstration.SUMMARY)}
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
    assert "| `text_to_code`, R@10 | 50.0 % | equal | equal | 25.0 % |" in lines


def test_a_command_that_is_stopped_keeps_the_finished_arms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_after_two(self: SeedDemonstration) -> Any:
        own = [run for run in list_runs() if run.seed == self.seed]
        yield from ([run] for run in own if run.arm != "averaged")
        raise KeyboardInterrupt

    SkillNet(small_config(tmp_path).model).save_pretrained(tmp_path / "base")
    monkeypatch.setattr(demonstration, "RESULTS", tmp_path)
    monkeypatch.setattr(SeedDemonstration, "train_arms", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        demonstration.main(["--base", str(tmp_path / "base"), "--seeds", "0", "1"])
    kept = newest_merge(tmp_path)
    assert kept == tmp_path / "2026-01-02-merge"
    assert {row["arm"] for row in rows_of(kept / demonstration.SCORES)} == {
        "base", "merged", "joint"
    }  # fmt: skip


def test_a_joint_run_starts_as_the_growths_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path))
    data = write_corpora(tmp_path / "corpora", rows=8, test_rows=4)
    write_labelled_clips(data)
    torch.manual_seed(0)
    SkillNet(small_config(data).model).save_pretrained(tmp_path / "base")
    first = replace(grow_config(str(tmp_path / "base"), data), run_dir=str(tmp_path))
    towers = {"input": SkillPlan(("general", "tone"), "video")}
    second = replace(
        first, skill=NewSkill("tone"), task=replace(first.task, name="tones", towers=towers)
    )
    config = build_joint_config([first, second])
    assert config.training.steps == 2 * first.training.steps
    new = ["head-counting", "head-tones", "skill-ink", "skill-tone"]
    assert config.training.trainable == new
    assert [config.tasks[name].weight for name in ("counting", "tones")] == [1.0, 1.0]
    assert set(config.trained) == {"counting", "tones"}
    start = SkillNet.from_pretrained(str(config.init_from)).state_dict()
    source = model_source.resolve_model(first.source)
    before = runs.load_growable_model(source)
    for growth in (first, second):
        settings = runs.build_growth_config(growth, source, before)
        grown = runs.build_grown_model(growth, before, settings.model.tasks[growth.task.name])
        for name, value in grown.state_dict().items():
            assert torch.equal(start[name], value), name
