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

Groups of ranks may compute different tasks at the same time
(:mod:`pipelines.training.loop.task_groups`). A bucket is then summed over the groups whose tasks
use it, and only they have it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.training.loading.dataloader import rank_slice
from pipelines.training.loop.task_groups import TaskGroups

NamedParameters = list[tuple[str, nn.Parameter]]

AnyTensor = TypeVar("AnyTensor", bound=Tensor)

#: Size of a bucket, as of DDP.
BUCKET_BYTES = 25 * 2**20


class _Bucket:
    """Gradients of some parameters in one flat tensor, followed by one number for a flag."""

    def __init__(self, parameters: list[nn.Parameter], tasks: tuple[str, ...]) -> None:
        self.parameters, self.tasks = parameters, tasks
        #: Groups that have it, and gradients that are missing in the last backward pass.
        self.owners: tuple[int, ...] = (0,)
        self.waiting = 0
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

    Attributes:
        norm: length of the gradient of all groups, after :meth:`finish`; None with one group.

    Args:
        active: task -> its (name, parameter) pairs in forward order.
        world: number of ranks.
        bucket_bytes: size of a bucket.
        groups: ranks that compute different tasks; None if all compute the same.
    """

    def __init__(
        self,
        active: Mapping[str, NamedParameters],
        world: int,
        bucket_bytes: float = BUCKET_BYTES,
        groups: TaskGroups | None = None,
    ) -> None:
        self._world = world
        self._groups = groups if groups is not None and groups.count > 1 else None
        self.bytes_reduced = 0
        self.norm: Tensor | None = None
        self._buckets: dict[str, list[_Bucket]] = {}
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._task: str | None = None
        #: Buckets of the last step, in the order of their reduction.
        self._step: list[_Bucket] = []
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
        buckets = _group_parameters(met, bucket_bytes)
        for task, parameters in met.items():
            position = {parameter: number for number, parameter in enumerate(parameters)}
            own = [bucket for bucket in buckets if bucket.parameters[0] in position]
            # The bucket whose last gradient is ready first is reduced first.
            own.sort(key=lambda bucket: max(position[p] for p in bucket.parameters))
            self._buckets[task] = own
        if self._groups is not None:
            for bucket in buckets:
                bucket.owners = self._groups.find_owners(bucket.tasks)
            self._groups.open_channels({bucket.owners for bucket in buckets})
        # A hook per parameter, also for parameters of several tasks.
        self._bucket_of = {p: bucket for bucket in buckets for p in bucket.parameters}
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    @property
    def nbytes(self) -> int:
        """Memory of the buckets that exist; each parameter has one place."""
        buckets = {id(b): b.flat.nbytes for own in self._buckets.values() for b in own}
        return sum(buckets.values())

    def begin(self, task: str, flag: bool = False, others: Iterable[str] = ()) -> None:
        """Prepare for the backward passes of a step.

        Args:
            task: name of that of the last pass; passes before it are :meth:`paused`.
            flag: whether this rank requests a stop.
            others: further tasks of the step, of all ranks.
        """
        self._flag = flag
        if self._world == 1:
            return
        for bucket in self._step:
            bucket.release()
        self._task, self._step = task, self._list_buckets(sorted({task, *others}))
        for bucket in self._step:
            bucket.attach()
            bucket.waiting = len(bucket.parameters) if task in bucket.tasks else 0

    def _list_buckets(self, tasks: list[str]) -> list[_Bucket]:
        """Return this rank's buckets of some tasks, in an order that is equal on all ranks."""
        places: dict[_Bucket, float] = {}
        for task in tasks:
            for place, bucket in enumerate(self._buckets[task]):
                later = place / len(self._buckets[task])
                places[bucket] = max(later, places.get(bucket, 0.0))
        ordered = sorted(places, key=lambda bucket: places[bucket])
        groups = self._groups
        return [each for each in ordered if groups is None or groups.is_owner(each.owners)]

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
        # Parameters without a gradient in this step never call the hook: theirs is zero.
        while len(self._reductions) < len(self._step):
            self._launch()
        for reduction in self._reductions:
            if reduction is not None:
                reduction.wait()
        self._reductions.clear()
        self._task = None
        if self._groups is not None:
            return self._flag_reader.read(self._sum_squares(self._groups))
        return self._flag_reader.read(self._step[-1].flag) if self._step else self._flag

    def _sum_squares(self, groups: TaskGroups) -> Tensor:
        """Compute the norm of the step, each gradient once; return the sum of flags."""
        first = self._step[0].gradients
        sums = torch.zeros(2, dtype=first.dtype, device=first.device)
        counted = [each.gradients for each in self._step if groups.is_first(each.owners)]
        if counted:
            sums[0] = nn.utils.get_total_norm(counted, foreach=True).square()
        sums[1].fill_(float(self._flag))
        dist.all_reduce(sums)
        self.norm = sums[0].sqrt()
        return sums[1:]

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._task is None or self._paused:
            return
        bucket = self._bucket_of[parameter]
        if self._task not in bucket.tasks:
            raise AssertionError(f"a parameter outside the plan of {self._task} has a gradient")
        bucket.waiting -= 1
        # Buckets start in a fixed order: collective operations must match on all ranks.
        launched = len(self._reductions)
        while launched < len(self._step) and self._step[launched].waiting == 0:
            self._launch()
            launched += 1

    def _launch(self) -> None:
        bucket, groups = self._step[len(self._reductions)], self._groups
        has_flag = bucket is self._step[-1] and groups is None
        if has_flag:
            bucket.flag.fill_(float(self._flag))
        values = bucket.flat if has_flag else bucket.gradients
        if groups is not None and len(bucket.owners) * groups.world == 1:
            self._reductions.append(None)  # this rank alone has it
            return
        channel = None if groups is None else groups.find_channel(bucket.owners)
        with torch.no_grad():
            self._reductions.append(dist.all_reduce(values, group=channel, async_op=True))
        self.bytes_reduced += values.nbytes


def broadcast_parameters(
    parameters: Iterable[nn.Parameter],
    bucket_bytes: float,
    device: torch.device | None = None,
    source: int = 0,
) -> None:
    """Give all ranks the values of one rank, in messages of about ``bucket_bytes``.

    Args:
        parameters: the same on all ranks, in the same order.
        bucket_bytes: size of a message; a larger parameter travels alone.
        device: from which messages are sent; None for that of the parameters.
        source: rank with the values.
    """
    _exchange(parameters, bucket_bytes, device, lambda flat: dist.broadcast(flat, src=source))


def send_tensors(
    tensors: Iterable[Tensor], source: int, target: int, rank: int, device: torch.device
) -> None:
    """Give one rank the values of another, which both call this.

    Args:
        tensors: values to send or to receive; equal shapes and order on both ranks.
        source: rank with the values.
        target: rank that receives them.
        rank: this rank, one of both.
        device: from which messages are sent.
    """

    def move(flat: Tensor) -> None:
        if rank == source:
            dist.send(flat, target)
        else:
            dist.recv(flat, source)

    _exchange(tensors, BUCKET_BYTES, device, move)


def _exchange(
    tensors: Iterable[Tensor],
    bucket_bytes: float,
    device: torch.device | None,
    move: Callable[[Tensor], Any],
) -> None:
    for group in _cut_buckets(tensors, bucket_bytes):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in group]).to(device)
        move(flat)
        pieces = flat.split([tensor.numel() for tensor in group])
        for tensor, piece in zip(group, pieces, strict=True):
            tensor.detach().copy_(piece.view_as(tensor))


def _group_parameters(met: Mapping[str, list[nn.Parameter]], bucket_bytes: float) -> list[_Bucket]:
    """Return all buckets; the parameters of a bucket belong to the same tasks."""
    tasks_of: dict[nn.Parameter, tuple[str, ...]] = {}
    for task, parameters in met.items():
        for parameter in parameters:
            tasks_of[parameter] = (*tasks_of.get(parameter, ()), task)
    sharing: dict[tuple[str, ...], list[nn.Parameter]] = {}
    for parameter, tasks in tasks_of.items():
        sharing.setdefault(tasks, []).append(parameter)
    return [
        _Bucket(group, tasks)
        for tasks, same in sharing.items()
        for group in _cut_buckets(same, bucket_bytes)
    ]


def _cut_buckets(tensors: Iterable[AnyTensor], bucket_bytes: float) -> list[list[AnyTensor]]:
    groups: list[list[AnyTensor]] = []
    filled = 0.0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        # A bucket has one dtype, because it is one flat tensor.
        fits = groups and filled + size <= bucket_bytes
        if not fits or groups[-1][0].dtype != tensor.dtype:
            groups.append([])
            filled = 0.0
        groups[-1].append(tensor)
        filled += size
    return groups


class DistributedGather:
    """Concatenation of the rows of all ranks, in rank order, with gradients.

    Sizes follow from the global count, as in ``rank_slice``, so ranks do not exchange them.

    Args:
        count: rows of all ranks.
        rank: index of this process among the ranks of the batch, from 0.
        world: number of ranks of the batch.
        channel: these ranks; None for all.
    """

    def __init__(
        self, count: int, rank: int, world: int, channel: dist.ProcessGroup | None = None
    ) -> None:
        self._channel = channel
        slices = [rank_slice(count, each, world) for each in range(world)]
        self.sizes = [part.stop - part.start for part in slices]
        self.start = slices[rank].start

    def __call__(self, x: Tensor) -> Tensor:
        """Return the (count, ...) rows of all ranks from the (B, ...) rows of this rank."""
        return _AllGather.apply(x, self.sizes, self.start, self._channel)

    def offset(self, rows: int) -> int:
        """Return the position of this rank's first row among the rows of all ranks."""
        return self.start


class _AllGather(torch.autograd.Function):
    """All-gather; its backward pass sums the gradient over ranks and keeps this rank's rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: list[int], start: int, channel: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.start, ctx.rows, ctx.channel = start, x.shape[0], channel
        # gloo needs equal sizes: pad to the longest slice.
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=channel)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total, group=ctx.channel)
        return total[ctx.start : ctx.start + ctx.rows], None, None, None
