"""The driver or the head of the cluster is killed: the same command resumes, bitwise."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.finetune import finetune
from pipelines.training.config.run import FinetuneConfig
from skillnet_platform import config as configuration
from tests.chaos.fault_injection import VARIABLE
from tests.integration.ranks import run_ranks, train_and_save
from tests.integration.test_faults import ROOT, STEPS, apart, config_for, same, weights

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an undisturbed run of two ranks ends with."""
    run = tmp_path_factory.mktemp("two")
    run_ranks(2, train_and_save, config_for(data, run, "two"), str(run), str(run / "out"))
    return weights(run)


def command(config: FinetuneConfig, root: Path, **environment: str) -> tuple[int, str]:
    """Exit code, and what it said, of a run as a user starts it."""
    path = root / f"{config.name}.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.faulty_finetune", "--config", str(path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stderr


@pytest.mark.slow("test_preemption.py::test_file_of_the_driver_requests_a_stop")
def test_a_driver_asked_to_leave_while_it_waits_for_hosts(data: Path, tmp_path: Path) -> None:
    """This machine is one host; two workers apart never find a place."""
    waits = {"workers": 3, "min_workers": 2, "placement_strategy": "strict_spread"}
    config = config_for(data, tmp_path, "waiting", **waits)
    path = tmp_path / "waiting.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "pipelines.finetune", "--config", str(path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if "waiting for nodes" in line:
                    break
            process.send_signal(signal.SIGTERM)
            said += process.communicate(timeout=120)[1].splitlines()
        finally:
            process.kill()
    assert process.returncode == 143, said
    assert "ended by SIGTERM while too few nodes were available to train" in "\n".join(said)
    # Ray's actors report a request that a busy machine answers late as a traceback.
    ours = [line for line in said if not re.search(r"\(\w+ pid=\d+", line)]
    assert "Traceback" not in "\n".join(ours)
    assert not (tmp_path / "waiting" / "model").exists()


def test_a_driver_killed(
    data: Path, tmp_path: Path, ray_session: Any, two: dict[str, torch.Tensor]
) -> None:
    """The killed driver has a Ray of its own; the second one joins the session's."""
    config = config_for(data, tmp_path, "driver", workers=2)
    run = tmp_path / "driver"
    fault = {"rank": 0, "step": 3, "kind": "kill", "victim": "driver"}
    code, said = command(config, tmp_path, SKILLNET_FAULTS=json.dumps(fault))
    assert code == -signal.SIGKILL, said
    assert not (run / "model").exists()
    result = finetune(config)
    assert (result["step"], result["world"], result["resumed"]) == (STEPS, 2, 2)
    assert same(weights(run), two)


HEAD = """
set -u
ip link set lo up
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
export RAY_AUTH_MODE=disabled
start() {
  ray start --head --node-ip-address 127.0.0.1 --port 6379 --num-cpus 2 \
    --object-store-memory 100000000 --disable-usage-stats >&2
}
start || exit 90
RAY_ADDRESS=127.0.0.1:6379 "$@"; echo first $?
ls "$RUN/checkpoints"
ray stop --force >&2
start || exit 91
RAY_ADDRESS=127.0.0.1:6379 "$@"; echo second $?
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None,
    reason="needs root, unshare and iproute2: it ends every Ray of its process namespace",
)
@pytest.mark.slow("test_driver_and_head.py::test_a_driver_killed")
def test_the_raylet_killed_and_the_head_started_again(
    data: Path, tmp_path: Path, two: dict[str, torch.Tensor]
) -> None:
    config = config_for(data, tmp_path, "head", workers=2)
    fault = {"rank": 1, "step": 5, "kind": "kill", "victim": "raylet"}
    assert VARIABLE not in os.environ
    said = apart(HEAD, config, tmp_path, fault, "-n", RUN=str(tmp_path / "head"))
    lines = said.splitlines()
    codes = [line for line in lines if line.startswith(("first ", "second "))]
    assert codes[-1] == "second 0", said
    assert codes[0] not in ("first 0", "first 2"), said
    assert "step-00000004" in lines, said
    assert same(weights(tmp_path / "head"), two)
