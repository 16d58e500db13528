"""A run's inputs are resolved at their first use, once, and callbacks see every step."""

from pathlib import Path

import pytest

from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from pipelines.training.loop.run import find_finished_result, validate_run
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config


def test_a_missing_corpus_is_an_error_only_when_it_is_needed(data: Path, run_root: Path) -> None:
    config = small_config(data)
    config.tasks["text_to_image"].corpus = "paintings"
    run = resolve_run(config)
    assert find_finished_result(run) is None
    with pytest.raises(UserError, match="paintings"):
        validate_run(run)


def test_a_fixed_number_of_workers_shares_the_inputs(data: Path, run_root: Path) -> None:
    run = resolve_run(small_config(data, workers=4, min_workers=2))
    dataloader, identity = run.dataloader, run.identity
    fixed = run.with_fixed_workers()
    assert (fixed.config.training.workers, fixed.config.training.min_workers) == (4, None)
    assert fixed.dataloader is dataloader
    assert fixed.identity is identity
    assert run.config.training.min_workers == 2


def test_callbacks_see_the_start_and_every_step(data: Path, tmp_path: Path) -> None:
    events: list[object] = []

    class Recorder:
        def on_train_start(self, folder: Path | None, rank: int) -> None:
            events.append((folder, rank))

        def on_step_start(self, step: int) -> None:
            events.append(step)

    run = ResolvedRun(small_config(data, steps=3), tmp_path)
    train_model(run, callbacks=[Recorder()], stop_at=2)
    train_model(run, callbacks=[Recorder()])
    assert events == [(tmp_path, 0), 0, 1, (tmp_path, 0), 2]
