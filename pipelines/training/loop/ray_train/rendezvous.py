"""Rendezvous of the workers of a run.

The address store of torch listens on all interfaces, also with a loopback address. On the embedded
Ray all workers run on one node and meet in a file, so only the process group itself listens, on
loopback. On a cluster the workers use Ray's own rendezvous.

Before they meet, the workers are compared: with different builds of torch, or without a GPU, the
process group fails with an error of its own, or waits until its timeout.

The controller of Ray Train imports this module and uses no tensor, so torch is imported inside the
functions that the workers run.
"""

import math
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

from skillnet_platform.cluster import loopback
from skillnet_platform.errors import UserError
from skillnet_platform.ray_internals.failure_policy import hide_user_errors


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Process group of the workers.

    Args:
        backend: ``gloo`` or ``nccl``.
        timeout_s: longest wait in a collective operation, in seconds.
        has_one_node: the workers meet in a file; those of several nodes at the address of the
            first worker.
    """

    backend: str
    timeout_s: int
    has_one_node: bool

    @property
    def backend_cls(self) -> type[Backend]:
        """Class that Ray Train instantiates."""
        return _FileRendezvous if self.has_one_node else _AddressRendezvous


def build_process_group_config(use_gpu: bool, timeout_s: float) -> ProcessGroupConfig:
    """Return the process group configuration for the Ray that this process is connected to.

    Args:
        use_gpu: NCCL instead of gloo.
        timeout_s: longest wait in a collective operation. A worker that is stopped, or whose
            network is cut, is only noticed by this timeout.
    """
    # Ray's setting is a whole number of seconds, and 0 would fail at once.
    backend, seconds = "nccl" if use_gpu else "gloo", math.ceil(timeout_s)
    return ProcessGroupConfig(backend, seconds, loopback.listens_on_loopback(ray))


@dataclass(frozen=True)
class WorkerBuild:
    """Build of torch of a worker.

    Args:
        node: name of its node.
        build: version of torch, with the build, such as ``2.13.0+cu128``.
        problem: why the worker has no GPU, if it needs one.
    """

    node: str
    build: str
    problem: str | None = None


def describe_build(use_gpu: bool) -> WorkerBuild:
    """Return the build of torch of this worker.

    Args:
        use_gpu: the worker needs a GPU.
    """
    import torch

    from pipelines.training.loop.setup import pick_device

    # An object of torch's own type would make the controller import torch to read it.
    build = str(torch.__version__)
    try:
        pick_device(use_gpu)
    except UserError as error:
        return WorkerBuild(platform.node(), build, str(error))
    return WorkerBuild(platform.node(), build)


def check_builds(workers: Sequence[WorkerBuild], use_gpu: bool) -> None:
    """Check that the workers can form a process group.

    Args:
        workers: their builds.
        use_gpu: the sums of GPUs need equal builds; those of CPUs need equal versions.

    Raises:
        UserError: a worker finds no GPU, or the builds differ; names the nodes.
    """
    for each in workers:
        if each.problem is not None:
            raise UserError(each.problem)
    nodes: dict[str, set[str]] = {}
    for each in workers:
        build = each.build if use_gpu else each.build.partition("+")[0]
        nodes.setdefault(build, set()).add(each.node)
    if len(nodes) > 1:
        listed = "; ".join(
            f"torch {build} on {', '.join(sorted(on))}" for build, on in nodes.items()
        )
        raise UserError(
            f"training.workers: the nodes have different builds of torch ({listed}). Install one "
            "build on all nodes; `skillnet doctor` compares them"
        )


def _compare_workers(worker_group: Any, backend_config: BackendConfig) -> None:
    assert isinstance(backend_config, ProcessGroupConfig)
    use_gpu = backend_config.backend == "nccl"
    hide_user_errors()
    found = [
        worker_group.execute_single_async(rank, describe_build, use_gpu)
        for rank in range(len(worker_group))
    ]
    check_builds(ray.get(found), use_gpu)


class _AddressRendezvous(Backend):
    share_cuda_visible_devices = True

    def __init__(self) -> None:
        from ray.train.torch import TorchConfig

        self._ray_backend = TorchConfig().backend_cls()

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Compare and join the workers; the controller calls this after each start of them."""
        from ray.train.torch import TorchConfig

        assert isinstance(backend_config, ProcessGroupConfig)
        _compare_workers(worker_group, backend_config)
        ray_config = TorchConfig(backend=backend_config.backend, timeout_s=backend_config.timeout_s)
        self._ray_backend.on_start(worker_group, ray_config)

    def on_training_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Set the variables of torch."""
        self._ray_backend.on_training_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Leave the process group."""
        self._ray_backend.on_shutdown(worker_group, backend_config)


class _FileRendezvous(Backend):
    share_cuda_visible_devices = True

    def __init__(self) -> None:
        self._folder: Path | None = None

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Join the workers; the controller calls this after each start of the workers."""
        assert isinstance(backend_config, ProcessGroupConfig)
        self._clean()
        _compare_workers(worker_group, backend_config)
        # Only this user can open the folder. It stays, because NCCL reads the file later too.
        self._folder = Path(tempfile.mkdtemp(prefix="skillnet-rendezvous-"))
        joining = [
            worker_group.execute_single_async(
                rank,
                _join,
                backend_config.backend,
                (self._folder / "store").as_uri(),
                rank,
                len(worker_group),
                backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Leave the process group without waiting for a rank that hangs; the workers end next."""
        leaving = worker_group.execute_async(_leave)
        ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_TIMEOUT_S)
        self._clean()

    def _clean(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


#: Seconds for the workers to leave their process group.
LEAVE_TIMEOUT_S = 30.0


def _join(backend: str, url: str, rank: int, world: int, timeout_s: int) -> None:
    import torch
    import torch.distributed as dist

    device = None
    if backend == "nccl":
        from ray.train.torch import get_device

        # Without it each rank of a node would open a context on the first GPU.
        device = get_device()
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=url,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
        device_id=device,
    )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
