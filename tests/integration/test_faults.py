"""Killing any part of a run costs time, never work: what is left equals an undisturbed run's."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.runs.progress_log import read_metric_history
from skillnet_platform import cli
from skillnet_platform import config as configuration
from skillnet_platform.errors import TerminatedError
from tests.chaos.fault_injection import VARIABLE, finetune_with_faults
from tests.helpers.small_corpora import small_config
from tests.integration.ranks import run_ranks, train_and_save

pytestmark = pytest.mark.integration

STEPS = 12
ROOT = Path(__file__).parents[2]


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
    train_model(ResolvedRun(config_for(data, run, "alone"), run))
    return weights(run)


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an undisturbed run of two ranks ends with."""
    run = tmp_path_factory.mktemp("two")
    run_ranks(2, train_and_save, config_for(data, run, "two"), str(run), str(run / "out"))
    return weights(run)


#: Faults of one run. Each is a restart of the workers, which takes a quarter of a minute or more.
FAULTS = (
    {"rank": 1, "step": 3, "kind": "kill"},
    {"rank": None, "step": 5, "kind": "kill"},
    {"rank": 0, "step": 7, "kind": "kill", "victim": "controller"},
    {"rank": 0, "step": 9, "kind": "raise"},
)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(FAULTS[:1], id="a worker"),
        pytest.param(
            FAULTS,
            id="workers, all workers, the controller",
            marks=pytest.mark.slow("test_faults.py::test_killed_processes_of_one_run"),
        ),
    ],
)
def test_killed_processes_of_one_run(
    data: Path,
    tmp_path: Path,
    ray_session: Any,
    two: dict[str, torch.Tensor],
    faults: tuple[dict[str, Any], ...],
) -> None:
    result = finetune_with_faults(config_for(data, tmp_path, "killed", workers=2), *faults)
    run = Path(result["run"])
    done = {path.name for path in (run / "faults").iterdir()}
    assert done == {f"{n}-{fault['kind']}-{fault['step']}" for n, fault in enumerate(faults)}
    assert (result["step"], result["world"]) == (STEPS, 2)
    assert result["resumed"] == faults[-1]["step"] - 1
    assert same(weights(run), two)
    steps = [
        step for step, _ in read_metric_history(run / "progress.jsonl")["training/learning_rate"]
    ]
    assert steps == list(range(1, STEPS + 1)), "each step is on record"


@pytest.mark.slow("test_faults.py::test_killed_processes_of_one_run")
def test_a_stopped_worker_leads_to_a_restart_from_the_last_checkpoint(
    data: Path,
    tmp_path: Path,
    ray_session: Any,
    two: dict[str, torch.Tensor],
) -> None:
    """SIGSTOP: the worker neither ends nor answers; only the timeout of the others notices it."""
    config = config_for(data, tmp_path, "stopped", workers=2, collective_timeout_s=45)
    result = finetune_with_faults(config, {"rank": 1, "step": 5, "kind": "stop"})
    assert (result["step"], result["world"], result["resumed"]) == (STEPS, 2, 4)
    assert same(weights(Path(result["run"])), two)


@pytest.mark.slow(
    "test_mirror.py::test_a_host_that_leaves_an_elastic_run_sends_its_checkpoint_before_it_goes"
)
def test_a_worker_asked_to_leave_takes_all_along_with_a_checkpoint(
    data: Path,
    tmp_path: Path,
    ray_session: Any,
    two: dict[str, torch.Tensor],
) -> None:
    config = config_for(data, tmp_path, "asked", workers=2, checkpoint_every=0)
    fault = {"rank": 1, "step": 5, "kind": "term"}
    with pytest.raises(TerminatedError, match="the same command"):
        finetune_with_faults(config, fault)
    run = tmp_path / "asked"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert not (run / "model").exists()
    result = finetune_with_faults(config, fault)
    assert result["resumed"] == 6
    assert same(weights(run), two)


@pytest.mark.slow("test_cli.py::test_mistakes_inside_ray_are_still_mistakes")
def test_a_user_error_in_a_worker_is_reported_and_not_tried_again(
    data: Path, tmp_path: Path, ray_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a checkpoint there is no bit to flip; a second attempt would find the fault's marker.
    fault = {"rank": 0, "step": 1, "kind": "flip"}
    config = config_for(data, tmp_path, "mistaken", workers=2)
    said: list[str] = []
    monkeypatch.setattr("skillnet_platform.console.print_error", said.append)
    assert cli.run_command(lambda _: finetune_with_faults(config, fault) and 0, []) == 2
    assert "holds no checkpoint to flip a bit of" in said[0]
    reported = (tmp_path / "mistaken" / "progress.jsonl").read_text(encoding="utf-8")
    assert reported.count('"losses": ""') == 1, "the workers were started once"


APART = ("unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc")

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare: it mounts, and ends every Ray of its process namespace",
)


FULL = """
mount -t tmpfs -o size=24m tmpfs "$RUN"
"$@"; echo first $?
ls "$RUN/checkpoints"
rm "$RUN/faults/ballast"
"$@"; echo second $?
cp -r "$RUN/checkpoints" "$RUN/model" "$KEPT"
"""


@pytest.mark.slow("test_checkpoints.py::test_full_disk_keeps_the_previous_checkpoint")
@needs_root
def test_a_disk_that_is_full_at_a_checkpoint(
    data: Path, tmp_path: Path, alone: dict[str, torch.Tensor]
) -> None:
    config = config_for(data, tmp_path, "full")
    (tmp_path / "full").mkdir()
    (tmp_path / "kept").mkdir()
    fault = {"step": 5, "kind": "full"}
    places = {"RUN": str(tmp_path / "full"), "KEPT": str(tmp_path / "kept")}
    said = apart(FULL, config, tmp_path, fault, **places)
    lines = said.splitlines()
    codes = [line for line in lines if line.startswith(("first", "second"))]
    assert codes == ["first 2", "second 0"], said
    (error,) = [line for line in lines if line.startswith("error:")]
    assert "the disk is full" in error
    assert "run the same command again" in error
    assert "step-00000004" in lines
    assert same(weights(tmp_path / "kept"), alone)


def apart(
    script: str,
    config: FinetuneConfig,
    root: Path,
    fault: dict[str, Any],
    *more: str,
    **environment: str,
) -> str:
    """What a script says in namespaces of its own; its arguments are the command of a run.

    ``more`` are further namespaces, as options of unshare.
    """
    path = root / f"{config.name}.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    words = [sys.executable, "-m", "tests.chaos.faulty_finetune", "--config", str(path)]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*APART, *more, "bash", "-c", script, "-", *words],
        env={
            **os.environ,
            "PATH": programs,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
            VARIABLE: json.dumps(fault),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.stdout
