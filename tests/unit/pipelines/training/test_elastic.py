"""Elastic runs: which settings fit, how many workers find a place, and whose notice ends a run."""

import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.run import FinetuneConfig, TrainingConfig
from pipelines.runs.identity import identity_of
from pipelines.training import preemption, worker
from skillnet_platform.errors import UserError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 2, "min_workers": 3}, r"between 1 and training.workers \(2\), got 3"),
        ({"workers": 2, "min_workers": 0}, "leave it out to train with all workers or none"),
        ({"workers": 0, "min_workers": 1}, "training.min_workers must be between 1"),
        ({"regrow_seconds": 0.0}, "training.regrow_seconds must be above 0"),
    ],
)
def test_settings_that_do_not_fit_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainingConfig(**given)


def test_a_run_may_become_elastic_when_it_is_taken_up() -> None:
    config = FinetuneConfig(training=TrainingConfig(workers=4))
    elastic = replace(config, training=replace(config.training, min_workers=1, regrow_seconds=5.0))
    assert identity_of(elastic) == identity_of(config)


CLUSTER = {"a": {"CPU": 4.0, "GPU": 1.0}, "b": {"CPU": 1.0}, "c": {"memory": 9.0}}


@pytest.mark.parametrize(
    ("one", "apart", "expected"),
    [
        ({"CPU": 1.0}, False, {"a": 4, "b": 1, "c": 0}),
        ({"CPU": 1.0}, True, {"a": 1, "b": 1, "c": 0}),
        ({"CPU": 1.5}, False, {"a": 2, "b": 0, "c": 0}),
        ({"CPU": 1.0, "GPU": 1.0}, False, {"a": 1, "b": 0, "c": 0}),
        ({"CPU": 0.0}, True, {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_places_for_workers(one: dict[str, float], apart: bool, expected: dict[str, int]) -> None:
    from pipelines.training.ray_train import elastic

    assert elastic.slots(CLUSTER, one, apart) == expected
    free = elastic.slots(CLUSTER, {}, apart=False)
    assert min(free.values()) > 1000


def test_a_host_that_refuses_connections_is_gone_whatever_the_head_believes() -> None:
    from pipelines.training.ray_train import elastic

    with socket.socket() as listening, socket.socket() as bound:
        for each in (listening, bound):
            each.bind(("127.0.0.1", 0))
        listening.listen()
        nodes = [
            {
                "NodeID": name,
                "Alive": alive,
                "NodeManagerAddress": "127.0.0.1",
                "NodeManagerPort": door.getsockname()[1],
                "Resources": {"CPU": 2.0},
            }
            for name, alive, door in [
                ("there", True, listening),
                ("gone", True, bound),
                ("known to be dead", False, listening),
            ]
        ]
        assert elastic.answering(nodes) == {"there": {"CPU": 2.0}}
    assert elastic.answering([]) == {}


def test_a_host_is_shunned_for_a_while_and_a_size_that_found_no_place_too() -> None:
    from pipelines.training.ray_train import elastic

    group = elastic.Group()
    group.leave(["a", "b"], now=100.0)
    assert group.shunned(100.0 + elastic.LEAVING_S - 1) == {"a", "b"}
    assert group.shunned(100.0 + elastic.LEAVING_S) == set()
    assert group.limit(100.0) == float("inf")
    group.unplaced(3, now=100.0)
    assert group.limit(101.0) == 2
    assert group.limit(100.0 + elastic.UNPLACED_S) == float("inf")


def test_a_workers_notice_is_its_hosts_and_the_drivers_ends_the_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption.listen_in_worker()
        with pytest.raises(preemption.Regroup) as told:
            worker._regroup(1, "host")
        assert told.value.leaving == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.asked()
        with pytest.raises(preemption.Regroup) as told:
            worker._regroup(1, "host")
        assert told.value.leaving == ["host"]
        (tmp_path / preemption.FILE).touch()
        with preemption.looking_for(preemption.FileSign(tmp_path / preemption.FILE)):
            while not preemption.ordered():
                pass
        worker._regroup(1, "host")
    finally:
        preemption.listen_in_worker()
        signal.signal(signal.SIGTERM, before)
    assert not preemption.asked()


def test_to_make_room_a_worker_is_asked_without_a_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        preemption.listen_in_worker()
        preemption.regroup()
        assert preemption.asked()
        assert not preemption.signalled()
        assert not preemption.ordered()
    finally:
        preemption.listen_in_worker()
        signal.signal(signal.SIGTERM, before)


def test_what_is_started_again_and_what_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    from pipelines.training.ray_train import elastic
    from pipelines.training.ray_train.failure_policy import MistakesEnd

    monkeypatch.setattr(elastic, "GROUP", elastic.Group(hosts={"a", "b"}))
    there = {"a": {"CPU": 1.0}, "b": {"CPU": 1.0}}
    monkeypatch.setattr(elastic, "answering", lambda nodes: there)
    monkeypatch.setattr(elastic.ray, "nodes", list)
    retry, end = FailureDecision.RETRY, FailureDecision.RAISE

    def failed(problem: Exception) -> WorkerGroupError:
        return WorkerGroupError("words", {1: problem})

    for kind in (MistakesEnd, elastic.HostsMayLeave):
        policy = kind(FailureConfig(max_failures=1))
        assert policy.make_decision(failed(UserError("the disk is full"))) == end
        assert policy.make_decision(failed(RuntimeError())) == retry
        assert policy.make_decision(failed(RuntimeError())) == end
    policy = elastic.HostsMayLeave(FailureConfig(max_failures=0))
    assert policy.make_decision(failed(preemption.Regroup(["b"]))) == retry
    assert set(elastic.GROUP.leaving) == {"b"}
    assert policy.make_decision(ControllerError(preemption.TooFewHosts())) == end
    policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert elastic.GROUP.most == 1
    assert policy.make_decision(failed(RuntimeError())) == end
    del there["b"]
    assert policy.make_decision(failed(RuntimeError())) == retry
