"""A device that fails in a step: one message, nothing lost, and the same command resumes."""

import platform
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop import step
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.run import find_finished_result
from pipelines.training.loop.worker import DeviceLostError, DeviceWatch
from pipelines.training.runs.layout import CONFIG, create_run_folder
from skillnet_platform.config import parse_config
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config, write_corpora

LOST = "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"


class FailingStep:
    """Forward pass that raises an error of the device in one step."""

    def __init__(self, error: Exception, at: int) -> None:
        self._error, self._at, self._real = error, at, step.step_loss

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._at -= 1
        if self._at == 0:
            raise self._error
        return self._real(*arguments, **options)


def accelerator_error() -> Exception:
    error = torch.AcceleratorError(LOST)
    assert isinstance(error, RuntimeError)
    return error


@pytest.mark.parametrize("error", [accelerator_error(), RuntimeError(LOST)])
def test_a_lost_device_is_named_and_the_run_resumes(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(write_corpora(tmp_path / "data"), steps=6, checkpoint_every=2)
    config.name = "lost"
    run = ResolvedRun(config, tmp_path / "run")
    watch = DeviceWatch(config, run.folder)
    with monkeypatch.context() as patch:
        patch.setattr(step, "step_loss", FailingStep(error, at=5))
        with pytest.raises(DeviceLostError) as caught, watch.explain_errors():
            train_model(run, callbacks=[watch])
    message = str(caught.value)
    for part in (
        f"{platform.node()}, its device, in step 5: the device failed (CUDA error: an illegal",
        "The checkpoint of step 4 is kept",
        "--name lost to resume",
    ):
        assert part in message
    assert "\n" not in message
    assert train_model(run).resumed == 4


def test_too_little_memory_names_the_option_and_ends_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    rows = max(task.batch_size for task in config.tasks.values())
    watch = DeviceWatch(config, tmp_path)
    watch.on_step_start(0)
    with pytest.raises(UserError) as caught, watch.explain_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    message = str(caught.value)
    assert "in step 1: out of memory" in message
    assert "No checkpoint exists yet" in message
    remedy = f"--training.micro_batch_size {rows // 2}"
    assert f"{remedy} or --training.activation_checkpointing true" in message
    config = replace(config, training=replace(config.training, activation_checkpointing=True))
    watch = DeviceWatch(config, tmp_path)
    with pytest.raises(UserError, match=f"{remedy} with --name"), watch.explain_errors():
        raise torch.OutOfMemoryError


def test_the_advice_about_memory_resumes_the_run_if_it_is_followed_to_the_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(write_corpora(tmp_path / "data"), steps=6, checkpoint_every=2)
    config = replace(config, name="small", run_dir=str(tmp_path), evaluate=False)
    run = ResolvedRun(config, tmp_path / "small")
    create_run_folder(config, run.folder)
    watch = DeviceWatch(config, run.folder)
    with monkeypatch.context() as patch:
        patch.setattr(step, "step_loss", FailingStep(torch.OutOfMemoryError(), at=5))
        with pytest.raises(UserError) as caught, watch.explain_errors():
            train_model(run, callbacks=[watch])
    assert "The checkpoint of step 4 is kept. Use " in str(caught.value)
    advice = re.findall(r"(--training\.\w+) (\w+)", str(caught.value))
    assert [key for key, _ in advice] == [
        "--training.micro_batch_size",
        "--training.activation_checkpointing",
    ]
    stored = ["--config", str(run.folder / CONFIG)]
    for words in (*advice, [word for option in advice for word in option]):
        followed = parse_config(FinetuneConfig, [*stored, *words, "--name", "small"], "skillnet")
        assert followed.training != config.training
        resumed = ResolvedRun(followed, run.folder)
        assert find_finished_result(resumed) is None
        shutil.copytree(run.folder, tmp_path / "again")
        assert train_model(ResolvedRun(followed, tmp_path / "again")).resumed == 4
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize(
    ("rows", "size", "workers", "remedy"),
    [
        (64, None, 1, "--training.micro_batch_size 32 with"),
        (64, None, 4, "--training.micro_batch_size 8 with"),
        (8, 32, 1, "--training.micro_batch_size 4 with"),  # all 8 rows were computed at once
        (8, 3, 1, "--training.micro_batch_size 1 with"),
        (64, 1, 1, "It needs a larger GPU"),  # a part has one row already
        (2, None, 2, "It needs a larger GPU"),
    ],
)
def test_the_advice_about_memory_needs_less_memory(
    rows: int, size: int | None, workers: int, remedy: str, tmp_path: Path
) -> None:
    config = small_config(
        tmp_path, micro_batch_size=size, workers=workers, activation_checkpointing=True
    )
    for task in config.tasks.values():
        task.batch_size = rows
    watch = DeviceWatch(config, tmp_path)
    with pytest.raises(UserError) as caught, watch.explain_errors():
        raise torch.OutOfMemoryError
    assert remedy in str(caught.value)


def test_other_errors_keep_their_messages(tmp_path: Path) -> None:
    watch = DeviceWatch(small_config(tmp_path), tmp_path)
    with pytest.raises(RuntimeError, match="another"), watch.explain_errors():
        raise RuntimeError("another error")
