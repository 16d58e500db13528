"""How the workers of a run find each other.

Torch's own store of addresses listens on every interface, whatever address it is given. On the
embedded Ray all workers are of one machine, and a file does: nothing listens but the process
group itself, on loopback. On a cluster Ray's way is kept.
"""

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


def torch_config(use_gpu: bool) -> TorchConfig:
    """The process group for a run on the Ray that this process is connected to."""
    kind = OnThisMachine if loopback.listens_on_loopback(ray) else TorchConfig
    return kind(backend="nccl" if use_gpu else "gloo")


@dataclass
class OnThisMachine(TorchConfig):
    """Workers of one machine, which meet in a file."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train calls."""
        return _MeetInAFile


class _MeetInAFile(Backend):
    share_cuda_visible_devices = True

    def __init__(self) -> None:
        self._folder: Path | None = None

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Called anew, by the controller, whenever the workers were started again."""
        assert isinstance(backend_config, OnThisMachine)
        self._clean()
        # A folder that only this user may open; NCCL looks into the file later too.
        self._folder = Path(tempfile.mkdtemp(prefix="skillnet-meeting-"))
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
        """The workers end next: a rank that hangs is not waited for."""
        leaving = worker_group.execute_async(_leave)
        ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_S)
        self._clean()

    def _clean(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


#: Seconds for the workers to leave their process group.
LEAVE_S = 30.0


def _join(backend: str, url: str, rank: int, world: int, timeout_s: int) -> None:
    dist.init_process_group(
        backend, init_method=url, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
    )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
