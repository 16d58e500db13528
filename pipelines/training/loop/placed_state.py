"""State of a training that lies on the ranks of some groups alone, joined for other uses.

:class:`PlacedState` is made by the training loop. Validations and the final model need the current
weights on all ranks; a checkpoint needs the state of all weights on the first rank.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from pipelines.training.loop.checkpointing import OPTIMIZER_STATE
from pipelines.training.loop.gradient_sync import BUCKET_BYTES, broadcast_parameters, send_tensors
from pipelines.training.loop.optimizer import WeightAverage
from pipelines.training.loop.task_groups import TaskGroups


class PlacedState:
    """Weights that some groups of ranks do not hold, and their first owners.

    Args:
        groups: ranks that compute different tasks.
        active: task -> weights that its steps change.
    """

    def __init__(
        self, groups: TaskGroups, active: Mapping[str, Sequence[tuple[str, nn.Parameter]]]
    ) -> None:
        self._groups = groups
        tasks_of: dict[str, list[str]] = {}
        for task, named in active.items():
            for name, _ in named:
                tasks_of.setdefault(name, []).append(task)
        #: Rank -> weights that others take from it; equal on all ranks.
        self._placed: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in {n: p for named in active.values() for n, p in named}.items():
            owners = groups.find_owners(tasks_of[name])
            if len(owners) < groups.count:
                source = owners[0] * groups.world
                self._placed.setdefault(source, []).append((name, parameter))

    def share_weights(self) -> None:
        """Give all ranks the current weights. All ranks call this."""
        for source, named in self._placed.items():
            broadcast_parameters((p for _, p in named), BUCKET_BYTES, source=source)

    @contextlib.contextmanager
    def joined(
        self, optimizer: torch.optim.Optimizer, average: WeightAverage | None
    ) -> Iterator[None]:
        """Give rank 0 the state of all groups, in the host's memory, inside a block.

        All ranks enter it, and share their weights.

        Args:
            optimizer: AdamW; rank 0 gets the state of other ranks.
            average: averaged weights; rank 0 gets those of other ranks.
        """
        if self._groups.count == 1:
            yield
            return
        self.share_weights()
        rank, state = self._groups.world_rank, optimizer.state
        own = {
            name: average.updates.get(name, 0) if average is not None else 0
            for name, parameter in self._placed.get(rank, [])
            if parameter in state
        }
        # Weight with a state -> updates of its average, of each rank.
        updates: list[dict[str, int]] = [{} for _ in range(self._groups.all_ranks)]
        dist.all_gather_object(updates, own)
        lent: list[tuple[str, nn.Parameter]] = []
        for source in sorted(self._placed.keys() - {0}):
            if rank not in (0, source):
                continue
            named = [(name, p) for name, p in self._placed[source] if name in updates[source]]
            if not rank:
                lent += named
                for name, parameter in named:
                    empty = torch.empty_like(parameter, device="cpu", requires_grad=False)
                    state[parameter] = {key: empty.clone() for key in OPTIMIZER_STATE}
                    state[parameter]["step"] = torch.zeros(())
                    if average is not None:
                        average.values[name] = empty.clone()
                        average.updates[name] = updates[source][name]
            tensors = [state[p][key] for key in OPTIMIZER_STATE for _, p in named]
            if average is not None:
                tensors += [average.values[name] for name, _ in named]
            send_tensors(tensors, source, 0, rank, self._placed[source][0][1].device)
        try:
            yield
        finally:
            for name, parameter in lent:
                del state[parameter]
                if average is not None:
                    del average.values[name], average.updates[name]
