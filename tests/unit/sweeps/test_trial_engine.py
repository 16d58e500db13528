"""Parts of the trial engine that need no Ray cluster: resources, resumed ASHA, pruning."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from pipelines.training.runs.progress_log import PROGRESS
from skillnet_platform import config as configuration
from skillnet_platform import tracking
from skillnet_platform.errors import UserError
from skillnet_platform.storage import write_json
from skillnet_platform.tracking import TrackingConfig, backend
from sweeps.config.trials import ResourceConfig, ScoreConfig
from sweeps.trials.engine import TrialDriver, run_trials
from sweeps.trials.ledger import WEIGHT_FOLDERS, LedgerEntry, prune_entries
from sweeps.trials.ray_tune import ResumableASHA
from sweeps.trials.trial import OUTCOME, ListedTrials, Trial, TrialOptions, TrialOutcome
from tests.helpers.small_corpora import small_config

REPORTS = [{"step": 2, "score": 0.9}, {"step": 4, "score": 0.95}]


@pytest.mark.parametrize(
    ("gpus", "use_gpu", "expected"),
    [
        (0.25, False, r"trial a: resources\.gpus is 0\.25, but training\.use_gpu is false"),
        (0.0, True, r"trial a: training\.use_gpu is true, but resources\.gpus is 0"),
    ],
)
def test_a_gpu_must_be_both_reserved_and_used(gpus, use_gpu, expected, tmp_path):
    trial = Trial("a", small_config(tmp_path / "corpora", use_gpu=use_gpu))
    parent: Any = None
    with pytest.raises(UserError, match=expected):
        run_trials(
            [trial], folder=tmp_path / "t", parent=parent, resources=ResourceConfig(gpus=gpus)
        )
    assert not (tmp_path / "t" / "a").exists()
    ResourceConfig(gpus=gpus).check(use_gpu=not use_gpu)


def decision(halving: ResumableASHA, name: str, score: float) -> str:
    """Return the decision about a trial that reaches the first rung with a score."""
    trial: Any = SimpleNamespace(trial_id=name)
    runner: Any = None
    halving.scheduler.on_trial_add(runner, trial)
    return halving.scheduler.on_trial_result(runner, trial, {"step": 2, "score": score})


def test_asha_replays_reports_from_before_a_kill() -> None:
    fresh, resumed = ResumableASHA(6, 2, 2.0), ResumableASHA(6, 2, 2.0)
    resumed.replay_reports("good", REPORTS)
    resumed.replay_reports("new", [])
    assert decision(fresh, "lame", 0.1) == TrialScheduler.CONTINUE, "it is the first"
    assert decision(resumed, "lame", 0.1) == TrialScheduler.STOP
    assert decision(resumed, "better", 0.99) == TrialScheduler.CONTINUE


def entry(root: Path, name: str, status: Any, score: float) -> LedgerEntry:
    """Return the ledger entry of an ended trial, with its files."""
    folder = root / name
    for heavy in WEIGHT_FOLDERS:
        (folder / heavy / "part").mkdir(parents=True)
    (folder / "evaluation.csv").touch()
    made = LedgerEntry(Trial(name, small_config(root)), folder)
    reports = [{"step": 2, "score": score}]
    made.outcome = TrialOutcome(name, name, folder, status, reports=reports)
    return made


def test_only_the_best_keep_models_and_checkpoints(tmp_path: Path) -> None:
    entries = [
        entry(tmp_path, "second", "finished", 0.5),
        entry(tmp_path, "best", "finished", 0.6),
        entry(tmp_path, "stopped", "stopped", 0.9),
        entry(tmp_path, "failed", "failed", 0.1),
        entry(tmp_path, "interrupted", "interrupted", 0.1),
    ]
    running = replace(entries[0], folder=tmp_path / "none", outcome=None)
    prune_entries([*entries, running], keep=1)
    left = {each.trial.name for each in entries if (each.folder / "checkpoints").exists()}
    assert left == {"best", "failed", "interrupted"}, (
        "trials without an end resume from their checkpoints"
    )
    assert not any((tmp_path / "second" / heavy).exists() for heavy in WEIGHT_FOLDERS)
    assert all((each.folder / "evaluation.csv").is_file() for each in entries)
    prune_entries(entries, keep=0)
    assert not (tmp_path / "best" / "model").exists()


def test_weights_that_no_score_brings_back_are_removed_as_trials_end(tmp_path: Path) -> None:
    trials = [
        Trial(f"{group}-{seed}", small_config(tmp_path), group=group)
        for group in "abc"
        for seed in range(2)
    ]
    parent: Any = None
    options = TrialOptions(tmp_path, parent, None, ResourceConfig(), None, 1, 1, "sweep")
    driver = TrialDriver(ListedTrials(trials), options)
    for trial in trials:
        folder = tmp_path / trial.name
        (folder / "model").mkdir(parents=True)
        driver.entries[trial.name] = LedgerEntry(trial, folder)

    def settle(name: str, score: float, status: Any = "finished") -> str:
        entry = driver.entries[name]
        entry.add_report({"step": 2, "score": score, "scores": {}})
        driver._settle(entry, status)
        return " ".join(n for n, e in driver.entries.items() if (e.folder / "model").is_dir())

    assert settle("b-0", 0.5) == "a-0 a-1 b-0 b-1 c-0 c-1"
    assert settle("b-1", 0.5) == "a-0 a-1 b-0 b-1 c-0 c-1", "the only complete group"
    assert settle("c-0", 0.0) == "a-0 a-1 b-0 b-1 c-0 c-1", "the other seed may be better"
    assert settle("c-1", 0.8) == "a-0 a-1 b-0 b-1"
    assert settle("a-0", 0.9, "failed") == "a-0 a-1 b-0 b-1"
    assert settle("a-1", 0.9) == "a-0 a-1 b-0 b-1", "the failed seed runs again"


@pytest.mark.parametrize("keep", range(4))
def test_pruning_on_the_way_keeps_what_pruning_at_the_end_keeps(tmp_path: Path, keep: int) -> None:
    config = small_config(tmp_path)
    random = np.random.default_rng(keep)

    def pruned(entries: list[LedgerEntry]) -> set[str]:
        return {each.trial.name for each in entries if each.is_pruned}

    for _ in range(200):
        outcomes = []
        for number in range(8):
            name, group = f"trial-{number}", f"group-{random.integers(4)}"
            status: Any = ["finished", "finished", "stopped", "failed"][random.integers(4)]
            reports = int(random.integers(2)) * [{"step": 2, "score": float(random.integers(4))}]
            outcome = TrialOutcome(name, group, tmp_path / name, status, reports=reports)
            outcomes.append(outcome)
        sizes = Counter(each.group for each in outcomes)
        on_the_way, at_the_end = (
            [LedgerEntry(Trial(each.name, config), each.folder) for each in outcomes]
            for _ in range(2)
        )
        for number in random.permutation(8):
            on_the_way[number].outcome = outcomes[number]
            prune_entries(on_the_way, keep, sizes.__getitem__)
        for entry, outcome in zip(at_the_end, outcomes, strict=True):
            entry.outcome = outcome
        prune_entries(at_the_end, keep)
        assert pruned(on_the_way) <= pruned(at_the_end)
        if all(each.status != "failed" for each in outcomes):
            assert pruned(on_the_way) == pruned(at_the_end)


@pytest.mark.parametrize("checkpoint", [None, 3])
def test_a_resumed_trial_counts_the_steps_of_its_checkpoint(tmp_path, checkpoint):
    resumed = LedgerEntry(Trial("a", small_config(tmp_path)), tmp_path / "a")
    if checkpoint is not None:
        (resumed.folder / f"checkpoints/step-{checkpoint:08d}").mkdir(parents=True)
    resumed.folder.mkdir(exist_ok=True)
    log = resumed.folder / PROGRESS
    log.write_text('{"step": 4}\n{"step": 8}\n', encoding="utf-8")
    resumed.begin()
    # The steps after the checkpoint are trained again.
    assert resumed.steps_before == resumed.steps_done() == (checkpoint or 0)
    with log.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 5}\n{"st')
    assert resumed.steps_done() == 5


@pytest.fixture
def parent(run_root: Path) -> Iterator[tracking.Tracker]:
    with tracking.start_run("parent", tracking=TrackingConfig(system_metrics=False)) as tracker:
        yield tracker


def test_a_trial_that_ended_without_its_driver_is_completed_once(parent, run_root):
    folder = run_root / "sweep" / "000-seed0"
    trial = Trial("000-seed0", small_config(run_root / "corpora"), splits=("validation",))
    opened = tracking.start_child_run(parent, trial.name, record=folder / "run.json")
    client = backend.create_client(parent.uri)
    # The next command of the experiment closes the run of a killed driver.
    client.set_tag(opened.run_id, "failure", "the process was killed")
    client.set_terminated(opened.run_id, "KILLED")
    write_json(folder / "config.yaml", configuration.to_dict(trial.config))
    row = {"task": "text_to_image", "split": "validation", "metric": "recall_at_10", "value": 0.75}
    result = {"step": 6, "seconds": 1.0, "model": "m", "name": trial.name, "evaluation": [row]}
    write_json(folder / "result.json", result)

    def resume() -> TrialOutcome:
        options = TrialOptions(
            folder.parent, parent, ScoreConfig(), ResourceConfig(), None, None, 1, "sweep"
        )
        (outcome,) = TrialDriver(ListedTrials([trial]), options).run()
        return outcome

    for _ in range(2):
        outcome = resume()
        assert (outcome.status, outcome.score, outcome.run_id) == ("finished", 0.75, opened.run_id)
        run = client.get_run(opened.run_id)
        assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "finished")
        assert "failure" not in run.data.tags
        assert run.data.metrics == {"score": 0.75}
        assert len(client.get_metric_history(opened.run_id, "score")) == 1
        assert json.loads((folder / OUTCOME).read_text())["score"] == 0.75
        assert len(client.search_runs([parent.experiment_id])) == 2, "the parent and one trial"
        before = run.info.end_time
    (folder / OUTCOME).unlink()
    resume()
    assert client.get_run(opened.run_id).info.end_time > before, "completed again, in the same run"
    assert len(client.search_runs([parent.experiment_id])) == 2


def test_a_sampled_trial_that_does_not_fit_opens_no_run(parent, run_root):
    """A point that is drawn after the start of the sweep is not known before."""
    trial = Trial("000-seed0", small_config(run_root / "corpora"), splits=("validation",))
    options = TrialOptions(
        run_root / "sweep", parent, ScoreConfig(), ResourceConfig(), None, None, 1, "sweep"
    )
    (outcome,) = TrialDriver(ListedTrials([trial]), options).run()
    assert (outcome.status, outcome.run_id) == ("failed", None)
    assert "missing" in str(outcome.error)
    # A resumed sweep tries a failed trial again, for example after its corpus is prepared.
    assert not (run_root / "sweep" / trial.name).exists()
    client = backend.create_client(parent.uri)
    assert len(client.search_runs([parent.experiment_id])) == 1, "only the parent"
