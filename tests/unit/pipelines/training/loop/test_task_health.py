"""A task whose steps change no weight ends its run, and is never registered."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.serving.registration import UntrainedTaskError, check_trained_tasks, register_model
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.task_dataset import TaskDataset
from pipelines.training.loop.loop import TrainResult, train_model
from pipelines.training.loop.reporter import LoopReporter
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.task_health import NonFiniteGradientError, TaskHealth
from pipelines.training.runs import checkpoints
from pipelines.training.runs.layout import TaskCounts, find_untrained_tasks
from pipelines.training.runs.model_source import resolve_model
from skillnet.objectives.ctc import ctc_loss, find_unalignable_rows
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config, write_corpora, write_scaled_sound

SPEECH = "speech_recognition"


class Lines(LoopReporter):
    """Keeps what the loop shows and logs."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.logged: dict[str, float] = {}

    def progress(self, step: int, losses: str) -> None:
        self.shown.append(losses)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.logged |= values


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpora(tmp_path_factory.mktemp("corpora") / "data")
    # A corpus of recordings whose values are all NaN, which passes every check of its shards.
    write_scaled_sound(folder / "syllables", folder / "broken", float("nan"))
    return folder


def with_broken_sound(data: Path, **training: object) -> FinetuneConfig:
    config = small_config(data, **training)
    config.tasks[SPEECH] = replace(config.tasks[SPEECH], corpus="broken")
    return config


def with_short_sound(data: Path, mel_stack: int = 40, **training: object) -> FinetuneConfig:
    """Recordings of at most 45 frames, and so of one or two tokens, with two symbols each."""
    config = small_config(data, **training)
    config.model = replace(config.model, mel_stack=mel_stack)
    return config


def test_a_task_whose_gradients_are_never_finite_ends_a_short_run(data, tmp_path):
    config, reporter = with_broken_sound(data, log_every=1), Lines()
    run = ResolvedRun(config, tmp_path / "run")
    steps = run.dataloader.count_steps(12)[SPEECH]
    with pytest.raises(
        NonFiniteGradientError,
        match=rf"{SPEECH} is untrained: none of its {steps} steps .*lower training\.lr",
    ):
        train_model(run, reporter=reporter)
    assert f"{SPEECH}: {steps} of {steps} steps skipped" in reporter.shown[-1]
    assert reporter.logged[f"{SPEECH}/nonfinite_steps"] == steps
    assert "nan" not in reporter.shown[-1]
    # The checkpoint of its last step holds the count: the same command fails again.
    with pytest.raises(NonFiniteGradientError, match=f"none of its {steps} steps"):
        train_model(ResolvedRun(config, tmp_path / "run"))


def test_a_task_whose_gradients_are_never_finite_ends_a_long_run_early(data, tmp_path):
    config, reporter = with_broken_sound(data, steps=500, log_every=1), Lines()
    message = rf"{SPEECH}: the gradient is not finite in the last 10 steps of this task"
    with pytest.raises(NonFiniteGradientError, match=message) as whole:
        train_model(ResolvedRun(config), reporter=reporter)
    assert len(reporter.shown) < 80
    # The counts continue after a restart.
    run = ResolvedRun(config, tmp_path)
    train_model(run, stop_at=30)
    assert checkpoints.find_newest(tmp_path / "checkpoints") is not None
    with pytest.raises(NonFiniteGradientError) as parts:
        train_model(run)
    assert str(parts.value) == str(whole.value)


@pytest.mark.parametrize("steps_per_read", [1, 7, 40])
def test_the_time_of_a_read_does_not_change_the_message(steps_per_read: int) -> None:
    """The host reads flags of the device when it logs, and counts all steps in their order."""
    health = TaskHealth(["one", "two"], "lower it", 1, torch.device("cpu"))

    def train() -> None:
        for step in range(40):
            is_bad = step >= 8 and step % 2 == 0
            health.add_step("one" if is_bad else "two", 4, torch.tensor(not is_bad), step)
            if (step + 1) % steps_per_read == 0:
                health.reduce()
        health.reduce()

    with pytest.raises(NonFiniteGradientError, match=r"last 10 steps .*, until step 26; "):
        train()
    assert health.counts["one"].nonfinite_steps == 10
    assert health.counts["two"].steps == 17


def test_a_checkpoint_with_an_untrained_task_is_not_registered(data: Path, tmp_path: Path) -> None:
    run = ResolvedRun(with_broken_sound(data), tmp_path / "run")
    stopped = train_model(run, stop_at=11)
    source = resolve_model(str(stopped.checkpoint))
    assert list(source.untrained) == [SPEECH]
    with pytest.raises(UserError, match=f"the task {SPEECH} is untrained, because none of its"):
        register_model(source, data)


def test_a_task_without_steps_is_not_registered(data: Path, tmp_path: Path) -> None:
    run = ResolvedRun(small_config(data, steps=2), tmp_path / "run")
    result = train_model(run)
    idle = {name for name, steps in run.dataloader.count_steps(2).items() if not steps}
    assert len(idle) == 3
    source = resolve_model(str(result.checkpoint))
    assert source.untrained.keys() == idle
    with pytest.raises(UntrainedTaskError, match="none of the 2 steps of its run"):
        register_model(source, data)
    # The final model has no head of an auxiliary task.
    for name in idle:
        source.settings.setdefault("tasks", {})[name] = {"corpus": "x", "auxiliary": True}
    check_trained_tasks(source)


def test_a_run_counts_the_steps_of_the_model_that_it_starts_from(data, tmp_path):
    parent = train_model(ResolvedRun(small_config(data, steps=12), tmp_path / "parent"))
    short = train_model(ResolvedRun(small_config(data, steps=1), tmp_path / "short"))
    for start, steps in ((parent, 12), (short, 1)):
        config = small_config(data, steps=1)
        config.init_from = str(start.checkpoint)
        run = tmp_path / f"from-{steps}"
        stopped = train_model(ResolvedRun(config, run))
        untrained = find_untrained_tasks({n: TaskCounts(**c) for n, c in stopped.tasks.items()})
        assert len(untrained) == (0 if steps == 12 else 4)
        assert resolve_model(str(stopped.checkpoint)).untrained == untrained


def test_a_healthy_run_keeps_the_content_of_its_checkpoints(data: Path, tmp_path: Path) -> None:
    result = train_model(ResolvedRun(small_config(data), tmp_path / "run"))
    found = checkpoints.find_newest(tmp_path / "run" / "checkpoints")
    assert found.state.keys() == {"step", "seed", "steps", "config_digest"}
    assert resolve_model(str(found.path)).untrained == {}
    counts = {name: TaskCounts(**each) for name, each in result.tasks.items()}
    assert sum(each.steps for each in counts.values()) == 12
    assert not any(each.problems for each in counts.values())


def test_a_task_whose_targets_never_fit_ends_the_run(data, monkeypatch):
    # Rows in an object store are not counted before the run.
    monkeypatch.setattr(TaskDataset, "_count_unalignable", lambda self: 0)
    reporter = Lines()
    config = with_short_sound(data, mel_stack=50, log_every=1)
    with pytest.raises(UserError, match=f"{SPEECH} is untrained: none of its .* rows has enough"):
        train_model(ResolvedRun(config), reporter=reporter)
    assert "rows too short for CTC" in reporter.shown[-1]


def count_short_rows(result: TrainResult) -> tuple[int, int]:
    counts = TaskCounts(**result.tasks[SPEECH])
    return counts.unalignable_rows, counts.rows


def test_rows_that_cannot_be_aligned_are_counted_in_all_parts_of_a_run(data, tmp_path):
    config, reporter = with_short_sound(data, mel_stack=28), Lines()
    short, rows = count_short_rows(train_model(ResolvedRun(config), reporter=reporter))
    assert 0 < short < rows
    assert f"{SPEECH}: {short} of {rows} rows too short for CTC" in reporter.shown[-1]
    assert reporter.logged[f"{SPEECH}/unalignable_rows"] == short
    run = ResolvedRun(config, tmp_path / "run")
    train_model(run, stop_at=6)
    assert count_short_rows(train_model(run)) == (short, rows)


def test_unalignable_rows_are_those_of_infinite_ctc_loss() -> None:
    torch.manual_seed(0)
    targets = torch.randint(1, 4, (200, 6))
    sizes, lengths = torch.randint(0, 7, (200,)), torch.randint(1, 10, (200,))
    log_probs = torch.randn(200, 9, 4, dtype=torch.float64).log_softmax(-1)
    losses = torch.stack(
        [
            ctc_loss(
                log_probs[i : i + 1], lengths[i : i + 1], targets[i : i + 1], sizes[i : i + 1], 1
            )
            for i in range(200)
        ]
    )
    found = find_unalignable_rows(lengths, targets, sizes)
    assert torch.equal(found, losses == 0)
    assert 20 < found.sum() < 180
