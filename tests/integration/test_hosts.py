"""Nodes leave and return: a run waits for them, or continues with the remaining ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.runs.progress_log import read_metric_history
from skillnet_platform import config as configuration
from tests.chaos.fault_injection import VARIABLE
from tests.chaos.namespaces import missing
from tests.chaos.ray_nodes import ray_hosts
from tests.helpers.waiting import wait_until
from tests.integration.ranks import run_ranks, train_and_save
from tests.integration.test_faults import STEPS, config_for, same, weights

pytestmark = pytest.mark.integration

#: Seconds for anything that a test waits for: several starts of Ray on a busy machine.
PATIENCE_S = 600.0
#: A host is taken for gone after a quarter of a minute instead of one: Ray's wait is not the test.
SOON = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture(scope="module", autouse=True)
def hosts_can_be_made() -> None:
    """Looked at here and not above: every collection of tests would make a host."""
    if reason := missing():
        pytest.skip(reason)


def near(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest difference."""
    assert one.keys() == other.keys()
    return max(
        float((one[name].double() - other[name].double()).abs().max()) if one[name].numel() else 0.0
        for name in one
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(1, id="fewer"),
        pytest.param(
            3,
            id="fewer, more, fewer",
            marks=pytest.mark.slow(
                "test_hosts.py::test_an_elastic_run_continues_with_the_nodes_that_are_left"
            ),
        ),
    ],
)
def test_an_elastic_run_continues_with_the_nodes_that_are_left(
    data: Path, tmp_path: Path, changes: int
) -> None:
    elastic = {"precision": "fp64", "workers": 2, "min_workers": 1, "resize_interval_s": 1.0}
    config = config_for(
        data, tmp_path, "elastic", placement_strategy="strict_spread", max_failures=0, **elastic
    )
    alone = tmp_path / "alone"
    train_model(ResolvedRun(config_for(data, tmp_path, "alone", precision="fp64"), alone))
    run = tmp_path / "elastic"
    order = [
        {"rank": None, "step": 5, "kind": "hold"},  # until its host is gone
        {"rank": None, "step": 8, "kind": "hold"},  # until there is room for two again
        {"rank": 1, "step": 10, "kind": "term"},  # its host is about to go
    ][:changes]
    with ray_hosts(tmp_path / "hosts", "head", "other", **SOON) as hosts:
        words = command(tmp_path, config)
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
    steps = [step for step, _ in reported["training/learning_rate"]]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert near(weights(run), weights(alone)) < 1e-9
    # Without a failure to spend: what hosts bring about is none.
    assert config.training.max_failures == 0
    words = ("1 node(s) left", "2 workers fit", "1 node(s) were asked to leave")
    assert [said.count(each) for each in words] == [1] * changes + [0] * (3 - changes), said
    assert said.count("training with 1 of 2 workers") == (changes + 1) // 2, said
    assert "Error in training function" not in said


@pytest.mark.slow("test_hosts.py::test_an_elastic_run_continues_with_the_nodes_that_are_left")
def test_a_host_that_comes_back_takes_its_place_again(data: Path, tmp_path: Path) -> None:
    config = config_for(data, tmp_path, "fixed", workers=2, placement_strategy="strict_spread")
    undisturbed = tmp_path / "two"
    run_ranks(
        2,
        train_and_save,
        config_for(data, tmp_path, "two"),
        str(undisturbed),
        str(tmp_path / "out"),
    )
    run = tmp_path / "fixed"
    order = {"rank": None, "step": 5, "kind": "hold"}
    with ray_hosts(tmp_path / "hosts", "head", "other", **SOON) as hosts:
        environment = {"RAY_ADDRESS": hosts.address, VARIABLE: json.dumps(order)}
        with hosts.started("head", *command(tmp_path, config), **environment) as process:
            wait_until((run / "faults" / "0-hold-5").exists, PATIENCE_S, process=process)
            hosts.kill("other")
            hosts.start("again")
            said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    trained = json.loads((run / "trained.json").read_text())
    assert (trained["step"], trained["world"], trained["resumed"]) == (STEPS, 2, 4)
    assert same(weights(run), weights(undisturbed))


def command(root: Path, config: Any) -> list[str]:
    path = root / f"{config.name}.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    return ["python", "-m", "tests.chaos.faulty_finetune", "--config", str(path)]
