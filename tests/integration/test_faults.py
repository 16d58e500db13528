"""Killing any part of a run costs time, never work: what is left equals an undisturbed run's.

``make chaos`` draws more interruptions by seed, and compares them in the same way.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.apart import KILLS
from pipelines.finetune import finetune
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.progress_log import read_metric_history
from skillnet_platform import config as configuration
from tests.chaos.fault_injection import VARIABLE, finetune_with_faults
from tests.chaos.namespaces import missing
from tests.chaos.ray_nodes import ray_hosts
from tests.chaos.run_measures import same, tensors
from tests.helpers.processes import run_python
from tests.helpers.small_corpora import small_config
from tests.helpers.waiting import wait_until
from tests.integration.ranks import run_ranks, train_and_save

pytestmark = [pytest.mark.integration, pytest.mark.long]

STEPS = 12
ROOT = Path(__file__).parents[2]
#: Seconds for anything that a test waits for: several starts of Ray on a busy machine.
PATIENCE_S = 600.0


def config_for(data: Path, root: Path, name: str, **training: Any) -> FinetuneConfig:
    values = {"steps": STEPS, "log_every": 1, "checkpoint_every": 2, "precision": "fp32"}
    values |= {"threads_per_worker": 1, "max_failures": 4}
    config = small_config(data, **(values | training))
    config.name, config.run_dir = name, str(root)
    config.tracking.uri = f"sqlite:///{root}/mlflow.db"
    config.tracking.register = False
    return config


Undisturbed = Callable[[int, str], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What an undisturbed run of (ranks, precision) ends with: model, optimiser and all."""

    @cache
    def train(world: int, precision: str) -> dict[str, torch.Tensor]:
        run = tmp_path_factory.mktemp("undisturbed")
        config = config_for(data, run, "undisturbed", precision=precision)
        run_ranks(world, train_and_save, config, str(run), str(run / "out"))
        return tensors(run, STEPS)

    return train


def steps_of(run: Path) -> list[int]:
    history = read_metric_history(run / "progress.jsonl")
    return [step for step, _ in history["training/learning_rate"]]


def kill(step: int, rank: int | None, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "step": step, "kind": "kill"} | more


#: Faults of one run. Each is a restart of the workers, which takes a quarter of a minute or more.
FAULTS = [kill(3, 1), kill(5, None), kill(7, 0, victim="controller"), kill(9, 0, kind="raise")]
#: SIGSTOP: the worker neither ends nor answers; the timeout of the others notices it.
STOPPED = [kill(5, 1, kind="stop")]


@pytest.mark.slow("test_faults.py::test_a_worker_and_then_the_driver_killed")
@pytest.mark.parametrize(
    ("faults", "training"),
    [(FAULTS, {}), (STOPPED, {"collective_timeout_s": 45})],
    ids=["workers, all workers, the controller", "stopped"],
)
def test_killed_processes_of_one_run(
    faults: list[dict[str, Any]],
    training: dict[str, Any],
    data: Path,
    tmp_path: Path,
    ray_session: Any,
    undisturbed: Undisturbed,
) -> None:
    config = config_for(data, tmp_path, "disturbed", workers=2, **training)
    result = finetune_with_faults(config, *faults)
    run = Path(result["run"])
    assert {path.name for path in (run / "faults").iterdir()} == {
        f"{number}-{fault['kind']}-{fault['step']}" for number, fault in enumerate(faults)
    }
    assert (result["step"], result["world"]) == (STEPS, 2)
    assert result["resumed"] == faults[-1]["step"] - 1
    assert same(tensors(run, STEPS), undisturbed(2, "fp32"))
    assert steps_of(run) == list(range(1, STEPS + 1)), "each step is on record"


def start_run(
    config: FinetuneConfig, root: Path, *before: str, **environment: str
) -> "subprocess.Popen[str]":
    """Start a run as a user does, after the words of another program."""
    path = root / f"{config.name}.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    words = [sys.executable, "-m", "tests.chaos.faulty_finetune", "--config", str(path)]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    paths = {"PATH": programs, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    return subprocess.Popen(
        [*before, *words],
        env={**os.environ, **paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_worker_and_then_the_driver_killed(
    data: Path, tmp_path: Path, ray_session: Any, undisturbed: Undisturbed
) -> None:
    config = config_for(data, tmp_path, "driver", workers=2)
    run = tmp_path / "driver"
    faults = json.dumps([kill(3, 1), kill(7, 0, victim="driver")])
    with start_run(config, tmp_path, **{VARIABLE: faults}) as process:
        said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGKILL, said
    assert {path.name for path in (run / "faults").iterdir()} == {"0-kill-3", "1-kill-7"}
    assert not (run / "model").exists()
    result = finetune(config)
    assert (result["step"], result["world"], result["resumed"]) == (STEPS, 2, 6)
    assert same(tensors(run, STEPS), undisturbed(2, "fp32"))
    assert steps_of(run) == list(range(1, STEPS + 1)), "each step is on record"


@pytest.mark.slow("test_preemption.py::test_file_of_the_driver_requests_a_stop")
def test_a_driver_asked_to_leave_while_it_waits_for_hosts(data: Path, tmp_path: Path) -> None:
    """This machine is one host; two workers apart never find a place."""
    waits = {"workers": 3, "min_workers": 2, "placement_strategy": "strict_spread"}
    config = config_for(data, tmp_path, "waiting", **waits)
    with start_run(config, tmp_path) as process:
        assert process.stdout is not None
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if "waiting for nodes" in line:
                    break
            process.send_signal(signal.SIGTERM)
            said += process.communicate(timeout=120)[0].splitlines()
        finally:
            process.kill()
    assert process.returncode == 143, said
    assert "ended by SIGTERM while too few nodes were available to train" in "\n".join(said)
    # Ray's actors report a request that a busy machine answers late as a traceback.
    ours = [line for line in said if not re.search(r"\(\w+ pid=\d+", line)]
    assert "Traceback" not in "\n".join(ours)
    assert not (tmp_path / "waiting" / "model").exists()


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
@pytest.mark.slow("test_faults.py::test_a_worker_and_then_the_driver_killed")
def test_the_raylet_killed_and_the_head_started_again(
    data: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    config = config_for(data, tmp_path, "head", workers=2)
    fault = kill(5, 1, victim="raylet")
    apart = ("unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc", "-n")
    environment = {VARIABLE: json.dumps(fault), "RUN": str(tmp_path / "head")}
    with start_run(config, tmp_path, *apart, "bash", "-c", HEAD, "-", **environment) as process:
        said, _ = process.communicate(timeout=PATIENCE_S)
    lines = said.splitlines()
    codes = [line for line in lines if line.startswith(("first ", "second "))]
    assert codes[-1] == "second 0", said
    assert codes[0] not in ("first 0", "first 2"), said
    assert "step-00000004" in lines, said
    assert same(tensors(tmp_path / "head", STEPS), undisturbed(2, "fp32"))


#: A host is taken for gone after a quarter of a minute instead of one: Ray's wait is not the test.
SOON = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(1, id="fewer"),
        pytest.param(
            3,
            id="fewer, more, fewer",
            marks=pytest.mark.slow(
                "test_faults.py::test_an_elastic_run_continues_with_the_nodes_that_are_left"
            ),
        ),
    ],
)
def test_an_elastic_run_continues_with_the_nodes_that_are_left(
    data: Path, tmp_path: Path, undisturbed: Undisturbed, changes: int
) -> None:
    elastic = {"precision": "fp64", "workers": 2, "min_workers": 1, "resize_interval_s": 1.0}
    if reason := missing():
        pytest.skip(reason)
    config = config_for(
        data, tmp_path, "elastic", placement_strategy="strict_spread", max_failures=0, **elastic
    )
    run = tmp_path / "elastic"
    order = [
        {"rank": None, "step": 5, "kind": "hold"},  # until its host is gone
        {"rank": None, "step": 8, "kind": "hold"},  # until there is room for two again
        {"rank": 1, "step": 10, "kind": "term"},  # its host is about to go
    ][:changes]
    path = tmp_path / "elastic.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    words = ["python", "-m", "tests.chaos.faulty_finetune", "--config", str(path)]
    with ray_hosts(tmp_path / "hosts", "head", "other", **SOON) as hosts:
        environment = {"RAY_ADDRESS": hosts.address, VARIABLE: json.dumps(order)}
        with hosts.started("head", *words, **environment) as process:
            wait_until((run / "faults" / "0-hold-5").exists, PATIENCE_S, process=process)
            hosts.kill("other")
            if changes > 1:
                wait_until((run / "faults" / "1-hold-8").exists, PATIENCE_S, process=process)
                hosts.start("again")
            said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    reported = read_metric_history(run / "progress.jsonl")
    workers = [(0, 2.0), (4, 1.0), (9, 2.0), (11, 1.0)][: changes + 1]
    assert reported["training/workers"] == workers, said
    assert json.loads((run / "trained.json").read_text())["world"] == 1
    assert sorted(set(steps_of(run))) == list(range(1, STEPS + 1))
    found, expected = tensors(run, STEPS), undisturbed(1, "fp64")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-9, msg=name)
    # Without a failure to spend: what hosts bring about is none.
    assert config.training.max_failures == 0
    words = ("1 node(s) left", "2 workers fit", "1 node(s) were asked to leave")
    assert [said.count(each) for each in words] == [1] * changes + [0] * (3 - changes), said
    assert said.count("training with 1 of 2 workers") == (changes + 1) // 2, said
    assert "Error in training function" not in said


HOSTS = """
import dataclasses, json, sys
from pathlib import Path
from benchmarks.apart import measure_apart
print(json.dumps(dataclasses.asdict(measure_apart(Path(sys.argv[1]), 200, 8, 8, seed=1))))
"""


@pytest.mark.slow("test_grow.py::test_growths_of_one_command_are_the_bits_of_growths_one_by_one")
def test_growths_on_eight_hosts_that_are_killed(tmp_path: Path) -> None:
    """``python -m benchmarks apart`` measures the same with longer growths."""
    done = run_python("-c", HOSTS, str(tmp_path), timeout=3 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == list(KILLS)
    assert found["restarts"] >= KILLS.count("process")
    assert (found["lost"], found["differing"]) == (0, 0)
    # The base goes out once per start, gradients once per step: here a third of the usual steps.
    assert found["moved"] <= 0.03 * found["exchanged"]
