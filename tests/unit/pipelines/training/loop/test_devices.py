"""Devices of a run: only workers touch them, the driver compares the run with its cluster.

A device that fails in a step: one message, nothing lost, and the same command resumes.
"""

import logging
import os
import pickle
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.train import ControllerError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig
from torch import distributed as dist

from pipelines.quickstart import QuickstartConfig, quickstart
from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loop import setup, step, worker
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.ray_train import fit, rendezvous
from pipelines.training.loop.ray_train.rendezvous import WorkerBuild
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from pipelines.training.loop.run import find_finished_result, train_and_evaluate, validate_run
from pipelines.training.loop.worker import DeviceLostError, DeviceWatch
from pipelines.training.runs.layout import CONFIG, create_run_folder
from skillnet_platform.cluster import capacity
from skillnet_platform.config import parse_config
from skillnet_platform.errors import UserError
from skillnet_platform.ray_internals.failure_policy import FailFastOnUserError, is_no_user_error
from tests.helpers.small_corpora import small_config, write_corpora

HEAD = {"CPU": 4.0}
GPU_NODE = {"CPU": 8.0, "GPU": 1.0}


class Session:
    """Stands for the connected ``ray`` module."""

    def __init__(self, nodes: list[dict[str, float]]) -> None:
        self._nodes = nodes

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None: ...

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self._nodes]


def connect(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float], startable: int = 0) -> None:
    """Let this process see a cluster of the given nodes, whose head it runs on."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    # It changes the environment of this process, which later tests share.
    monkeypatch.setattr(capacity, "prepare_ray_environment", lambda: None)
    monkeypatch.setattr(capacity, "ray_session", lambda: Session(list(nodes)))
    monkeypatch.setattr(capacity, "list_startable_nodes", lambda: startable * [GPU_NODE])


def gpus(workers: int, **more: Any) -> TrainingConfig:
    return TrainingConfig(use_gpu=True, workers=workers, **more)


def test_a_driver_without_a_gpu_starts_a_run_on_a_cluster_with_gpus(tmp_path, monkeypatch):
    connect(monkeypatch, HEAD, *4 * [GPU_NODE])
    config = small_config(write_corpora(tmp_path / "data"), use_gpu=True, workers=4)
    for task in config.tasks.values():
        task.batch_size = 4
    setup.require_devices(config.training)
    validate_run(resolve_run(config))


@pytest.mark.parametrize(
    ("nodes", "startable", "training", "message"),
    [
        (
            [HEAD],
            0,
            gpus(4),
            r"training\.workers 4 with training\.use_gpu need 4 GPUs; the cluster has 0\. Lower",
        ),
        ([HEAD, GPU_NODE], 2, gpus(4), "need 4 GPUs; the cluster has 3"),
        ([HEAD], 4, gpus(4), None),
        ([HEAD, GPU_NODE], 0, gpus(4, min_workers=1), None),
        (
            [HEAD],
            0,
            gpus(4, min_workers=2),
            r"training\.min_workers 2 with training\.use_gpu need 2 GPUs; the cluster has 0",
        ),
        (
            [{"CPU": 1.0, "GPU": 2.0}],
            0,
            gpus(2),
            "need 2 GPUs with 1 CPU each; the nodes of the cluster have room for 1 of them",
        ),
        (
            [{"CPU": 16.0, "GPU": 2.0}],
            0,
            gpus(2, placement_strategy="strict_spread"),
            "need 2 GPUs on as many nodes; the cluster has 2 GPUs on fewer",
        ),
    ],
    ids=range(7),
)
def test_the_gpus_of_a_run_are_those_of_the_cluster(
    nodes, startable, training, message, monkeypatch
):
    connect(monkeypatch, *nodes, startable=startable)
    if message is None:
        setup.require_devices(training)
        return
    with pytest.raises(UserError, match=message):
        setup.require_devices(training)


@pytest.mark.parametrize(
    ("training", "address", "is_worker", "expected"),
    [
        ({}, "", False, "process"),
        ({"placement_strategy": "strict_spread"}, "", False, "process"),
        ({}, "10.0.0.1:6379", False, "ray"),
        ({"workers": 2}, "", False, "ray"),
        ({"use_gpu": True}, "", False, "ray"),
        ({"min_workers": 1}, "", False, "ray"),
        ({"use_gpu": True}, "10.0.0.1:6379", True, "process"),
    ],
    ids=range(7),
)
def test_one_worker_on_one_machine_is_the_process_of_the_command(
    training, address, is_worker, expected, data, run_root, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    started: list[str] = []

    def start(name: str) -> Callable[..., None]:
        def stop(*given: Any, **more: Any) -> None:
            started.append(name)
            raise UserError("started")

        return stop

    monkeypatch.setattr(worker, "run_worker", start("process"))
    monkeypatch.setattr(fit, "fit_on_ray", start("ray"))
    tracker: Any = SimpleNamespace(inputs=lambda manifests: None, run_id="a", uri="b")
    run = resolve_run(small_config(data, **training))
    with pytest.raises(UserError, match="started"):
        train_and_evaluate(run, tracker, is_worker=is_worker)
    assert started == [expected]


def test_pods_that_the_autoscaler_may_start_are_waited_for(monkeypatch, capsys, tmp_path):
    connect(monkeypatch, HEAD)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(capacity, "BOOTSTRAP", tmp_path / "absent.yaml")
    setup.require_devices(gpus(2))
    assert "The run waits for the autoscaler" in " ".join(capsys.readouterr().err.split())


def test_a_machine_without_gpus_is_named_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = QuickstartConfig(data=str(tmp_path / "data"), archives=str(tmp_path / "archives"))
    config.training.use_gpu = True
    with pytest.raises(UserError, match=r"need 1 GPU; this machine has 0\. Set RAY_ADDRESS"):
        quickstart(config)
    assert not list(tmp_path.iterdir())


def test_a_worker_without_a_gpu_names_its_node_and_its_torch() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=f"torch {torch.__version__[:4]}.*finds no GPU on "):
        setup.pick_device(use_gpu=True)


def test_threads_are_those_of_the_worker_and_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert setup.count_threads(1, 1) == 16
    assert setup.count_threads(1, 4) == 4
    assert setup.count_threads(1, 64) == 1
    assert setup.count_threads(8, 2) == 8
    assert setup.count_threads(64, 1) == 16, "slots of Ray may exceed the cores"


def test_a_gpu_worker_reserves_its_share_of_the_cpus_of_a_node() -> None:
    assert capacity.share_of_cpus([HEAD, GPU_NODE]) == 8
    assert capacity.share_of_cpus([HEAD, GPU_NODE, {"CPU": 4.0, "GPU": 1.0}]) == 4
    assert capacity.share_of_cpus([{"CPU": 192.0, "GPU": 8.0}]) == 8
    assert capacity.share_of_cpus([{"CPU": 2.0, "GPU": 4.0}]) == 1
    assert fit.worker_resources(gpus(2), [HEAD, GPU_NODE]) == {"CPU": 8.0, "GPU": 1.0}
    assert fit.worker_resources(TrainingConfig(workers=2), [GPU_NODE]) == {"CPU": 1.0}


def test_workers_with_different_builds_of_torch_do_not_start() -> None:
    mixed = [WorkerBuild("a", "2.13.0+cu128"), WorkerBuild("b", "2.13.0+cu126")]
    with pytest.raises(UserError) as caught:
        rendezvous.check_builds(mixed, use_gpu=True)
    for part in ("torch 2.13.0+cu128 on a", "torch 2.13.0+cu126 on b", "one build on all nodes"):
        assert part in str(caught.value)
    # The sums of CPUs need equal versions only.
    rendezvous.check_builds(mixed, use_gpu=False)
    with pytest.raises(UserError, match=r"torch 2.13.0 on a; torch 2.12.1 on b"):
        rendezvous.check_builds([mixed[0], WorkerBuild("b", "2.12.1+cu128")], use_gpu=False)


def test_the_controller_reads_a_worker_without_torch() -> None:
    assert b"torch" not in pickle.dumps(rendezvous.describe_build(use_gpu=False).build)


def test_a_worker_without_a_gpu_is_named_before_the_process_group() -> None:
    found = rendezvous.describe_build(use_gpu=True)
    with pytest.raises(UserError, match=f"finds no GPU on {platform.node()}"):
        rendezvous.check_builds([WorkerBuild("other", found.build), found], use_gpu=True)
    rendezvous.check_builds([rendezvous.describe_build(use_gpu=False)], use_gpu=False)


def test_an_error_before_the_start_of_the_workers_ends_the_run() -> None:
    policy = FailFastOnUserError(FailureConfig(max_failures=3))
    error = ControllerError(UserError("the nodes have different builds of torch"))
    assert policy.make_decision(error) is FailureDecision.RAISE
    # The driver prints it, so the controller's log does not.
    record = logging.LogRecord("x", 40, "x", 1, "failed", None, (UserError, UserError("x"), None))
    assert not is_no_user_error(record)
    record.exc_info = (ValueError, ValueError("x"), None)
    assert is_no_user_error(record)


def test_the_loss_of_a_device_is_found_among_the_errors_of_the_workers() -> None:
    failures = {0: RuntimeError("Connection closed by peer"), 1: DeviceLostError("b, GPU 0: lost")}
    found = fit.find_device_loss(failures)
    assert found is not None
    assert str(found) == "b, GPU 0: lost"
    assert fit.find_device_loss({0: failures[0]}) is None


def test_each_worker_needs_a_row_of_each_batch(tmp_path: Path) -> None:
    config = small_config(write_corpora(tmp_path / "data"), workers=4)
    config.tasks["text_to_image"].batch_size = 3
    with pytest.raises(UserError) as caught:
        validate_run(resolve_run(config))
    for part in ("tasks.text_to_image.batch_size is 3", "(4)", "--training.workers 3"):
        assert part in str(caught.value)


def test_the_timeout_reaches_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skillnet_platform.cluster.loopback.listens_on_loopback", lambda ray: True)
    config = rendezvous.build_process_group_config(use_gpu=False, timeout_s=12.5)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: asked.update(options)
    )
    rendezvous._join("gloo", "file:///x", 0, 2, config.timeout_s)
    assert asked["timeout"].total_seconds() == 13


def test_a_rank_takes_its_gpu_before_the_group_opens_contexts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cuda:3"))
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: asked.append(options["device_id"])
    )
    rendezvous._join("nccl", "file:///x", 3, 8, 600)
    assert asked == [torch.device("cuda:3")] * 2
    asked.clear()
    rendezvous._join("gloo", "file:///x", 3, 8, 600)
    assert asked == [None]


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


def test_a_lost_device_is_named_and_the_run_resumes(tmp_path, monkeypatch):
    config = small_config(write_corpora(tmp_path / "data"), steps=6, checkpoint_every=2)
    config.name = "lost"
    run = ResolvedRun(config, tmp_path / "run")
    watch = DeviceWatch(config, run.folder)
    with monkeypatch.context() as patch:
        patch.setattr(step, "step_loss", FailingStep(torch.AcceleratorError(LOST), at=5))
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
    with pytest.raises(DeviceLostError), watch.explain_errors():
        raise RuntimeError(LOST)
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
    assert f"{remedy} or --training.kept_tokens 0" in message
    config = replace(config, training=replace(config.training, kept_tokens=0))
    watch = DeviceWatch(config, tmp_path)
    with pytest.raises(UserError, match=f"{remedy} with --name"), watch.explain_errors():
        raise torch.OutOfMemoryError


def test_the_advice_about_memory_resumes_the_run_if_it_is_followed_to_the_letter(
    tmp_path, monkeypatch
):
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
        "--training.kept_tokens",
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
def test_the_advice_about_memory_needs_less_memory(rows, size, workers, remedy, tmp_path):
    config = small_config(tmp_path, micro_batch_size=size, workers=workers, kept_tokens=0)
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
