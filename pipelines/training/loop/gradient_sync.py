"""Sum of gradients over ranks: only of active skills, in buckets, during the backward pass.

DDP needs ``find_unused_parameters`` if the used parameters change from step to step; it then walks
the graph each step and reduces every parameter. Here the task of a step determines the parameters.
Parameters that the same tasks use share buckets, so a task uses whole buckets and each parameter
is in one of them. Only the buckets of the last task exist::

    general   ████ ████ ████   all tasks
    text      ████             the four tasks that read text
    image     ████             text_to_image
    head      █                one task

A gradient is a view of its bucket, so it is not copied. A bucket is reduced as soon as its last
gradient is ready. A loss is a sum over a rank's rows divided by the global count, so gradients are
summed, not averaged.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.training.loading.dataloader import rank_slice

NamedParameters = list[tuple[str, nn.Parameter]]

#: Size of a bucket, as of DDP.
BUCKET_BYTES = 25 * 2**20


class _Bucket:
    """Gradients of some parameters in one flat tensor, followed by one number for a flag."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._sizes = [p.numel() for p in parameters]
        self.release()

    def attach(self) -> None:
        """Let the parameters accumulate their gradients in this bucket, from zero."""
        first = self.parameters[0]
        self.flat = torch.zeros(sum(self._sizes) + 1, dtype=first.dtype, device=first.device)
        self.gradients, self.flag = self.flat[:-1], self.flat[-1:]
        pieces = self.gradients.split(self._sizes)
        for piece, parameter in zip(pieces, self.parameters, strict=True):
            parameter.grad = piece.view_as(parameter)

    def release(self) -> None:
        """Free the memory of the bucket, after the gradients are used."""
        self.flat = self.gradients = self.flag = torch.empty(0)


class FlagReader:
    """Reader of the sum of all ranks' flags.

    On a GPU the host would wait for the backward pass of the step, and then have no work in the
    queue of the device. It reads the flag of a step at the end of the next step, on all ranks.
    """

    def __init__(self) -> None:
        self._copied: tuple[Tensor, torch.Event] | None = None

    def read(self, flag: Tensor) -> bool:
        """Return whether a flag was set: in this step on a CPU, in the step before on a GPU."""
        if flag.device.type == "cpu":
            return bool(flag.item() > 0)
        before, event = self._copied, torch.Event(flag.device.type)
        # torch puts the result of an asynchronous copy into pinned memory.
        self._copied = (flag.to("cpu", non_blocking=True), event)
        event.record()
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0].item() > 0)


class GradientSync:
    """Sum of the active parameters' gradients over all ranks.

    Call ``begin(task)`` before the backward pass and ``finish()`` after it. In between, hooks
    start the reduction of each bucket when its last gradient is ready, always in the same order,
    so ranks need no further communication. With one rank it does nothing.

    A flag of each rank travels as one more number in the last bucket, so all ranks know after the
    step whether one of them requested a stop; on GPUs one step later, so that no step waits.

    Args:
        active: task -> its (name, parameter) pairs in forward order.
        world: number of ranks.
        bucket_bytes: size of a bucket.
    """

    def __init__(
        self,
        active: Mapping[str, NamedParameters],
        world: int,
        bucket_bytes: float = BUCKET_BYTES,
    ) -> None:
        self._world = world
        self.bytes_reduced = 0
        self._buckets: dict[str, list[_Bucket]] = {}
        self._where: dict[str, dict[nn.Parameter, int]] = {}
        self._task: str | None = None
        self._last: list[_Bucket] = []
        self._waiting: list[int] = []
        self._reductions: list[Any] = []
        self._flag = self._paused = False
        self._flag_reader = FlagReader()
        # One rank needs no buckets and no hooks.
        if world == 1:
            return
        # Backward meets parameters in the reverse of their first use.
        met = {
            task: [p for _, p in reversed(named) if p.requires_grad]
            for task, named in active.items()
        }
        buckets = [_Bucket(group) for group in _group_parameters(met, bucket_bytes)]
        for task, parameters in met.items():
            position = {parameter: number for number, parameter in enumerate(parameters)}
            own = [bucket for bucket in buckets if bucket.parameters[0] in position]
            # The bucket whose last gradient is ready first is reduced first.
            own.sort(key=lambda bucket: max(position[p] for p in bucket.parameters))
            self._buckets[task] = own
            self._where[task] = {p: i for i, bucket in enumerate(own) for p in bucket.parameters}
        # A hook per parameter, also for parameters of several tasks.
        for parameter in {p for parameters in met.values() for p in parameters}:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    @property
    def nbytes(self) -> int:
        """Memory of the buckets that exist; each parameter has one place."""
        buckets = {id(b): b.flat.nbytes for own in self._buckets.values() for b in own}
        return sum(buckets.values())

    def begin(self, task: str, flag: bool = False) -> None:
        """Prepare for a backward pass of a task, with this rank's flag."""
        self._flag = flag
        if self._world == 1:
            return
        for bucket in self._last:
            bucket.release()
        self._task, self._last = task, self._buckets[task]
        self._waiting = [len(bucket.parameters) for bucket in self._buckets[task]]
        for bucket in self._buckets[task]:
            bucket.attach()

    @contextlib.contextmanager
    def paused(self, is_paused: bool = True) -> Iterator[None]:
        """Let backward passes inside the block add to the gradients without starting a reduction.

        Args:
            is_paused: False changes nothing.
        """
        before, self._paused = self._paused, self._paused or is_paused
        try:
            yield
        finally:
            self._paused = before

    def finish(self) -> bool:
        """Reduce the remaining buckets, and wait until all gradients are sums.

        On a GPU its own queue waits, not the host.

        Returns:
            Whether the flag of any rank was set, in this step, or on GPUs in the step before; the
            same on all ranks.
        """
        if self._world == 1 or self._task is None:
            return self._flag
        buckets = self._buckets[self._task]
        # Parameters without a gradient in this step never call the hook: theirs is zero.
        while len(self._reductions) < len(buckets):
            self._launch()
        for reduction in self._reductions:
            reduction.wait()
        self._reductions.clear()
        self._task = None
        return self._flag_reader.read(buckets[-1].flag) if buckets else self._flag

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._task is None or self._paused:
            return
        index = self._where[self._task].get(parameter)
        if index is None:
            raise AssertionError(f"a parameter outside the plan of {self._task} has a gradient")
        self._waiting[index] -= 1
        # Buckets start in a fixed order: collective operations must match on all ranks.
        launched = len(self._reductions)
        while launched < len(self._waiting) and self._waiting[launched] == 0:
            self._launch()
            launched += 1

    def _launch(self) -> None:
        assert self._task is not None
        buckets = self._buckets[self._task]
        bucket = buckets[len(self._reductions)]
        is_last = bucket is buckets[-1]
        if is_last:
            bucket.flag.fill_(float(self._flag))
        values = bucket.flat if is_last else bucket.gradients
        with torch.no_grad():
            self._reductions.append(dist.all_reduce(values, async_op=True))
        self.bytes_reduced += values.nbytes


def broadcast_parameters(
    parameters: Iterable[nn.Parameter], bucket_bytes: float, device: torch.device | None = None
) -> None:
    """Give all ranks the values of rank 0, in messages of about ``bucket_bytes``.

    Args:
        parameters: the same on all ranks, in the same order.
        bucket_bytes: size of a message; a larger parameter travels alone.
        device: from which messages are sent; None for that of the parameters.
    """
    for group in _cut_buckets(parameters, bucket_bytes):
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in group]).to(device)
        dist.broadcast(flat, src=0)
        pieces = flat.split([parameter.numel() for parameter in group])
        for parameter, piece in zip(group, pieces, strict=True):
            parameter.detach().copy_(piece.view_as(parameter))


def _group_parameters(
    met: Mapping[str, list[nn.Parameter]], bucket_bytes: float
) -> list[list[nn.Parameter]]:
    """Return the parameters of each bucket: all of a bucket belong to the same tasks."""
    tasks_of: dict[nn.Parameter, tuple[str, ...]] = {}
    for task, parameters in met.items():
        for parameter in parameters:
            tasks_of[parameter] = (*tasks_of.get(parameter, ()), task)
    sharing: dict[tuple[str, ...], list[nn.Parameter]] = {}
    for parameter, tasks in tasks_of.items():
        sharing.setdefault(tasks, []).append(parameter)
    return [group for same in sharing.values() for group in _cut_buckets(same, bucket_bytes)]


def _cut_buckets(
    parameters: Iterable[nn.Parameter], bucket_bytes: float
) -> list[list[nn.Parameter]]:
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
        rank: index of this process among the workers, from 0.
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
