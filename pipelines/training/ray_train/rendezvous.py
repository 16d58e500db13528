"""Rendezvous of the workers of a run.

The address store of torch listens on all interfaces, also with a loopback address. On the embedded
Ray all workers run on one node and meet in a file, so only the process group itself listens, on
loopback. On a cluster the workers use Ray's own rendezvous.
"""

import math
import shutil
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig

from skillnet_platform.cluster import loopback


def build_torch_config(use_gpu: bool, timeout_s: float) -> TorchConfig:
    """Return the process group configuration for the Ray that this process is connected to.

    Args:
        use_gpu: NCCL instead of gloo.
        timeout_s: longest wait in a collective operation. A worker that is stopped, or whose
            network is cut, is only noticed by this timeout.
    """
    config_class = SingleNodeTorchConfig if loopback.listens_on_loopback(ray) else TorchConfig
    backend = "nccl" if use_gpu else "gloo"
    # Ray's setting is a whole number of seconds, and 0 would fail at once.
    return config_class(backend=backend, timeout_s=math.ceil(timeout_s))


@dataclass
class SingleNodeTorchConfig(TorchConfig):
    """Process group of workers on one node, which meet in a file."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Class that Ray Train instantiates."""
        return _FileRendezvous


class _FileRendezvous(Backend):
    share_cuda_visible_devices = True

    def __init__(self) -> None:
        self._folder: Path | None = None

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Join the workers; the controller calls this after each start of the workers."""
        assert isinstance(backend_config, SingleNodeTorchConfig)
        self._clean()
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
    dist.init_process_group(
        backend, init_method=url, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
    )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
