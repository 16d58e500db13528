"""Sum of gradients over ranks: only of active skills, in buckets, during the backward pass.

DDP needs ``find_unused_parameters`` if the used parameters change from step to step; it then walks
the graph each step and reduces every parameter. Here the task of a step determines the parameters:
buckets are fixed per task, and each is reduced as soon as it is full. A loss is a sum over a
rank's rows divided by the global count, so gradients are summed, not averaged.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.loading.dataloader import rank_slice

NamedParameters = list[tuple[str, nn.Parameter]]


class _Bucket:
    """Gradients of some parameters in one flat tensor; the last one of a task also has a flag."""

    def __init__(self, parameters: list[nn.Parameter], flagged: bool) -> None:
        self.parameters = parameters
        first = parameters[0]
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(sizes) + flagged, dtype=first.dtype, device=first.device)
        self.flag = self.flat[sum(sizes) :]
        pieces = zip(self.flat[: sum(sizes)].split(sizes), parameters, strict=True)
        self.views = [piece.view_as(p) for piece, p in pieces]

    def fill(self) -> None:
        """Copy the gradients in; a missing gradient counts as zeros."""
        with torch.no_grad():
            for view, parameter in zip(self.views, self.parameters, strict=True):
                if parameter.grad is None:
                    view.zero_()
                else:
                    view.copy_(parameter.grad)

    def drain(self) -> None:
        """Use the reduced values as the parameters' gradients, without a copy."""
        for view, parameter in zip(self.views, self.parameters, strict=True):
            parameter.grad = view


class GradientSync:
    """Sum of the active parameters' gradients over all ranks.

    Call ``begin(task)`` before the backward pass and ``finish()`` after it. In between, hooks
    start the reduction of each bucket when its last gradient is ready, always in the same order,
    so ranks need no further communication. With one rank it does nothing.

    A flag of each rank travels as one more number in the last bucket, so all ranks know after the
    step whether one of them requested a stop.

    Args:
        active: task -> its (name, parameter) pairs in forward order.
        world: number of ranks.
        bucket_bytes: size of a bucket.
    """

    def __init__(self, active: dict[str, NamedParameters], world: int, bucket_bytes: float) -> None:
        self._world = world
        self.bytes_reduced = 0
        self._buckets: dict[str, list[_Bucket]] = {}
        self._where: dict[str, dict[nn.Parameter, int]] = {}
        self._task: str | None = None
        self._waiting: list[int] = []
        self._next = 0
        self._handles: list[Any] = []
        self._flag = False
        # One rank needs no buckets and no hooks.
        if world == 1:
            return
        for task, named in active.items():
            # Backward meets parameters in the reverse of their first use.
            groups = _cut([p for _, p in reversed(named) if p.requires_grad], bucket_bytes)
            last = len(groups) - 1
            self._buckets[task] = [_Bucket(group, i == last) for i, group in enumerate(groups)]
            self._where[task] = {p: i for i, group in enumerate(groups) for p in group}
        # A hook per parameter, also for parameters of several tasks.
        every = {p for where in self._where.values() for p in where}
        for parameter in every:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def begin(self, task: str, flag: bool = False) -> None:
        """Prepare for a backward pass of a task, with this rank's flag."""
        self._flag = flag
        if self._world == 1:
            return
        self._task, self._next = task, 0
        self._waiting = [len(bucket.parameters) for bucket in self._buckets[task]]

    def finish(self) -> bool:
        """Reduce the remaining buckets, wait for all, and replace the gradients by the sums.

        Returns:
            Whether the flag of any rank was set; the same on all ranks.
        """
        if self._world == 1 or self._task is None:
            return self._flag
        buckets = self._buckets[self._task]
        # Parameters without a gradient in this step never call the hook.
        while self._next < len(buckets):
            self._launch()
        for handle, bucket in zip(self._handles, buckets, strict=True):
            handle.wait()
            bucket.drain()
        self._handles.clear()
        self._task = None
        return bool(buckets[-1].flag.item() > 0) if buckets else self._flag

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._task is None:
            return
        index = self._where[self._task].get(parameter)
        if index is None:
            raise AssertionError(f"a parameter outside the plan of {self._task} has a gradient")
        self._waiting[index] -= 1
        # Buckets start in a fixed order: collective operations must match on all ranks.
        while self._next < len(self._waiting) and self._waiting[self._next] == 0:
            self._launch()

    def _launch(self) -> None:
        assert self._task is not None
        bucket = self._buckets[self._task][self._next]
        bucket.fill()
        bucket.flag.fill_(float(self._flag))
        self._handles.append(dist.all_reduce(bucket.flat, async_op=True))
        self.bytes_reduced += bucket.flat.numel() * bucket.flat.element_size()
        self._next += 1


def _cut(parameters: Iterable[nn.Parameter], bucket_bytes: float) -> list[list[nn.Parameter]]:
    groups: list[list[nn.Parameter]] = []
    filled = 0.0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        # A bucket has one dtype, because it is one flat tensor.
        fits = groups and filled + size <= bucket_bytes
        if not fits or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            filled = 0.0
        groups[-1].append(parameter)
        filled += size
    return groups


class DistributedGather:
    """Concatenation of the rows of all ranks, in rank order, with gradients.

    Sizes follow from the global count, as in ``rank_slice``, so ranks do not exchange them.

    Args:
        count: rows of all ranks.
        rank: this rank.
        world: number of ranks.
    """

    def __init__(self, count: int, rank: int, world: int) -> None:
        slices = [rank_slice(count, each, world) for each in range(world)]
        self.sizes = [part.stop - part.start for part in slices]
        self.start = slices[rank].start

    def __call__(self, x: Tensor) -> Tensor:
        """Return the (count, ...) rows of all ranks from the (B, ...) rows of this rank."""
        return _AllGather.apply(x, self.sizes, self.start)

    def offset(self, rows: int) -> int:
        """Return the position of this rank's first row among the rows of all ranks."""
        return self.start


class _AllGather(torch.autograd.Function):
    """All-gather; its backward pass sums the gradient over ranks and keeps this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], start: int) -> Tensor:
        ctx.start, ctx.rows = start, x.shape[0]
        # gloo needs equal sizes: pad to the longest slice.
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.rows], None, None
