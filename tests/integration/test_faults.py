"""Killing any part of a run costs time, never work: what is left equals an undisturbed run's."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.finetune import finetune, history
from pipelines.training import faults
from pipelines.training.loop import train
from pipelines.training.settings import FinetuneConfig
from skillnet_platform import config as configuration
from skillnet_platform.errors import Terminated
from tests.integration.ranks import run_ranks, train_and_save
from tests.small_corpora import small_config, write_corpora

pytestmark = pytest.mark.integration

STEPS = 12
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data")


def config_for(data: Path, root: Path, name: str, **training: Any) -> FinetuneConfig:
    values = {"steps": STEPS, "log_every": 1, "checkpoint_every": 2, "precision": "fp32"}
    values |= {"threads_per_worker": 1, "max_failures": 4}
    config = small_config(data, **(values | training))
    config.name, config.run_dir = name, str(root)
    config.tracking.uri = f"sqlite:///{root}/mlflow.db"
    config.tracking.register = False
    return config


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint: model, optimiser and all."""
    (last,) = (run / "checkpoints").glob(f"step-{STEPS:08d}")
    return {
        f"{path.name}:{name}": value
        for path in last.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an undisturbed run in one process ends with."""
    run = tmp_path_factory.mktemp("alone")
    train(config_for(data, run, "alone"), run=run)
    return weights(run)


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an undisturbed run of two ranks ends with."""
    run = tmp_path_factory.mktemp("two")
    run_ranks(2, train_and_save, config_for(data, run, "two"), str(run), str(run / "out"))
    return weights(run)


def order(monkeypatch: pytest.MonkeyPatch, *each: dict[str, Any]) -> None:
    monkeypatch.setenv(faults.VARIABLE, json.dumps(each))


def command(config: FinetuneConfig, root: Path, **environment: str) -> "subprocess.Popen[str]":
    """The run as a user starts it."""
    path = root / f"{config.name}.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.finetune", "--config", str(path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: "subprocess.Popen[str]", seconds: float = 300) -> tuple[int, str]:
    """Exit code and what it said; whatever it started is gone after it."""
    try:
        _, said = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, said


def test_workers_and_the_controller_killed_in_one_run(
    data: Path,
    tmp_path: Path,
    ray_session: Any,
    two: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order(
        monkeypatch,
        {"rank": 1, "step": 3, "kind": "kill"},
        {"rank": None, "step": 5, "kind": "kill"},
        {"rank": 0, "step": 7, "kind": "kill", "victim": "controller"},
        {"rank": 0, "step": 9, "kind": "raise"},
    )
    config = config_for(data, tmp_path, "killed", workers=2)
    result = finetune(config)
    run = Path(result["run"])
    done = {path.name for path in (run / "faults").iterdir()}
    assert done == {"0-kill-3", "1-kill-5", "2-kill-7", "3-raise-9"}
    assert (result["step"], result["world"], result["resumed"]) == (STEPS, 2, 8)
    assert same(weights(run), two)
    steps = [step for step, _ in history(run / "progress.jsonl")["training/learning_rate"]]
    assert steps == list(range(1, STEPS + 1)), "each step is on record"


def test_a_worker_asked_to_leave_takes_all_along_with_a_checkpoint(
    data: Path,
    tmp_path: Path,
    ray_session: Any,
    two: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_for(data, tmp_path, "asked", workers=2, checkpoint_every=0)
    order(monkeypatch, {"rank": 1, "step": 5, "kind": "term"})
    with pytest.raises(Terminated, match="the same command"):
        finetune(config)
    run = tmp_path / "asked"
    (kept,) = (run / "checkpoints").iterdir()
    # Ray hands a signal on within its poll of a tenth of a second: the steps here are shorter.
    assert 5 < int(kept.name.removeprefix("step-")) < STEPS
    assert not (run / "model").exists()
    result = finetune(config)
    assert result["resumed"] == int(kept.name.removeprefix("step-"))
    assert same(weights(run), two)
