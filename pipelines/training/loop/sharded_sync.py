"""Gradients of sharded weights: FSDP sums them over ranks, and each rank takes its part.

:class:`ShardedSync` has the interface of
:class:`pipelines.training.loop.gradient_sync.GradientSync`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from pipelines.training.loop.gradient_sync import FlagReader
from pipelines.training.loop.sharding import ModelShards


class ShardedSync:
    """Sum of the active weights' gradients over all ranks; each rank keeps its part.

    Call ``begin(task)`` before the backward pass and ``finish()`` after it. A flag of each rank is
    summed beside the step, so all ranks know after it whether one of them requested a stop; on
    GPUs one step later, so that no step waits.

    Args:
        shards: divided weights of the model.
        active: task -> names and parts of the weights that its steps change.
    """

    def __init__(
        self, shards: ModelShards, active: Mapping[str, Sequence[tuple[str, nn.Parameter]]]
    ) -> None:
        self._shards, self._active = shards, active
        self.bytes_reduced = 0
        self._task = ""
        self._flag = torch.zeros(1, device=shards.device)
        self._handle: Any = None
        self._flag_reader = FlagReader()

    def begin(self, task: str, flag: bool = False) -> None:
        """Prepare for a backward pass of a task, with this rank's flag."""
        self._task = task
        self._flag.fill_(float(flag))
        self._handle = dist.all_reduce(self._flag, async_op=True)

    @contextlib.contextmanager
    def paused(self, is_paused: bool = True) -> Iterator[None]:
        """Let backward passes inside the block add to the gradients without starting a reduction.

        The gathered weights stay for the next pass.

        Args:
            is_paused: False changes nothing.
        """
        runner = self._shards.runner
        assert isinstance(runner, FSDPModule)
        if not is_paused:
            yield
            return
        runner.set_requires_gradient_sync(False)
        runner.set_reshard_after_backward(False)
        try:
            yield
        finally:
            runner.set_requires_gradient_sync(True)
            runner.set_reshard_after_backward(True)

    def finish(self) -> bool:
        """Give the parts of the active weights their gradients, which are sums.

        Returns:
            Whether the flag of any rank was set; see :meth:`GradientSync.finish`.
        """
        for name, part in self._active[self._task]:
            gradient = self._shards.take_gradient(name)
            # Weights without a gradient in this step have that of zero, as without shards.
            part.grad = torch.zeros_like(part) if gradient is None else gradient
            self.bytes_reduced += self._shards.count_bytes(name)
        self._handle.wait()
        return self._flag_reader.read(self._flag)
