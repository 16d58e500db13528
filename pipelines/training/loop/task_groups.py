"""Groups of ranks that compute different tasks of a step at the same time.

With ``training.tasks_per_step`` a step has a batch for each lane of the schedule, and the sum of
their gradients. :class:`TaskGroups`, which the loop makes, divides the ranks into as many groups as
both numbers allow. A group computes its lanes one after the other, so all numbers of ranks give the
same weights::

    4 ranks, 2 lanes    ranks 0, 1: lane 0    ranks 2, 3: lane 1
    2 ranks, 4 lanes    rank 0: lanes 0, 1    rank 1: lanes 2, 3
    3 ranks, 2 lanes    all ranks: lanes 0, 1

A rank holds the gradients, optimizer state and averages of the tasks of its lanes alone. Its model
has old values of the other weights until :meth:`PlacedState.share_weights` of
:mod:`pipelines.training.loop.placed_state`.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class TaskGroups:
    """Division of ranks into groups of equal size, each with lanes of its own.

    Attributes:
        count: number of groups; with one, all ranks hold everything.
        rank: index of this process in its group, from 0.
        world: ranks of a group.
        lanes: lanes of this rank's group.
        world_rank: index of this process among all workers, from 0.
        all_ranks: number of all workers.

    Args:
        lanes: tasks of each lane of the schedule.
        rank: index of this process among all workers, from 0.
        world: number of all workers.
        timeout_s: seconds that a rank waits for the others of its groups.
    """

    def __init__(
        self,
        lanes: Sequence[Collection[str]],
        rank: int = 0,
        world: int = 1,
        timeout_s: float = 1800.0,
    ) -> None:
        self.count = math.gcd(len(lanes), world)
        self.world = world // self.count
        self._group, self.rank = divmod(rank, self.world)
        share = len(lanes) // self.count
        self.lanes = range(self._group * share, (self._group + 1) * share)
        parts = [lanes[start : start + share] for start in range(0, len(lanes), share)]
        self._tasks = [set().union(*part) for part in parts]
        self.world_rank, self.all_ranks = rank, world
        self._timeout = timedelta(seconds=timeout_s)
        self._channels: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def find_owners(self, tasks: Iterable[str]) -> tuple[int, ...]:
        """Return the groups that compute any of some tasks."""
        wanted = set(tasks)
        return tuple(number for number, own in enumerate(self._tasks) if own & wanted)

    def is_owner(self, owners: tuple[int, ...]) -> bool:
        """Return whether this rank's group is among some groups."""
        return self._group in owners

    def is_first(self, owners: tuple[int, ...]) -> bool:
        """Return whether this is the first rank of some groups."""
        return self.world_rank == owners[0] * self.world

    def open_channels(self, owners: Collection[tuple[int, ...]]) -> None:
        """Let ranks of some groups communicate, and those of each group. All ranks call this.

        Args:
            owners: combinations of groups, equal on all ranks.
        """
        # Also where this rank is no member: torch numbers groups on all ranks alike.
        for groups in sorted({*owners, *((number,) for number in range(self.count))}):
            ranks = [g * self.world + rank for g in groups for rank in range(self.world)]
            if 1 < len(ranks) < self.all_ranks:
                channel = dist.new_group(ranks, timeout=self._timeout)
                if isinstance(channel, dist.ProcessGroup):  # this rank is a member
                    self._channels[groups] = channel

    def find_channel(self, owners: tuple[int, ...] | None = None) -> dist.ProcessGroup | None:
        """Return the process group of some groups, or of this rank's own; None for all ranks.

        Args:
            owners: groups with more than one rank in all; None is the own group.
        """
        return self._channels.get((self._group,) if owners is None else owners)

    def find_held(self, active: Mapping[str, Iterable[tuple[str, Any]]]) -> set[str]:
        """Return the names of the weights that this rank updates.

        Args:
            active: task -> weights that its steps change.
        """
        tasks = self._tasks[self._group] if self.count > 1 else active
        return {name for task in tasks for name, _ in active[task]}
