"""A device that fails in a step: one message, nothing lost, and the same command resumes."""

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training import step
from pipelines.training.device_errors import DeviceLostError, DeviceWatch
from pipelines.training.loop import train_model
from pipelines.training.resolved_run import ResolvedRun
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
    config = small_config(tmp_path, micro_batch_size=32)
    watch = DeviceWatch(config, tmp_path)
    watch.on_step_start(0)
    with pytest.raises(UserError) as caught, watch.explain_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    message = str(caught.value)
    assert "in step 1: out of memory" in message
    assert "No checkpoint exists yet" in message
    assert "--training.micro_batch_size 16 or --training.activation_checkpointing true" in message
    config = replace(config, training=replace(config.training, activation_checkpointing=True))
    watch = DeviceWatch(config, tmp_path)
    with pytest.raises(UserError, match="micro_batch_size 16; see"), watch.explain_errors():
        raise torch.OutOfMemoryError


def test_other_errors_keep_their_messages(tmp_path: Path) -> None:
    watch = DeviceWatch(small_config(tmp_path), tmp_path)
    with pytest.raises(RuntimeError, match="another"), watch.explain_errors():
        raise RuntimeError("another error")
