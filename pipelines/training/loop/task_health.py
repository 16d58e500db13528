"""Limits of steps and rows that do not train their task.

A step whose gradient is not finite makes no update. A CTC row with more symbols than tokens has no
alignment and contributes zero to the loss. Both leave the weights as they are, so a task can look
trained and be random. The training loop counts both per task with :class:`TaskHealth`.

Both are known on the device. The host reads them at each log and before each checkpoint, and then
counts the steps in their order, so a limit has the same message whenever it is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.training.loading.dataloader import Batch
from pipelines.training.runs.layout import TaskCounts, parse_task_counts
from skillnet.objectives.heads import head_class
from skillnet.skills import Task
from skillnet_platform.errors import UserError

#: Consecutive steps without a finite gradient, of one task or of all, before training gives up.
MAX_NONFINITE_STEPS = 10
#: Fraction of a task's steps without a finite gradient that is tolerated beyond that number.
MAX_NONFINITE_FRACTION = 0.25
#: Key of the counts in a checkpoint's ``state.json``.
STATE_KEY = "tasks"


class NonFiniteGradientError(UserError, FloatingPointError):
    """Too many steps of a task had a gradient that is not finite."""


class _UnreadStep(NamedTuple):
    """Step whose flag is still on the device."""

    task: str
    rows: int
    step: int
    is_finite: Tensor


class TaskHealth:
    """Counter of the steps and rows of each task that made no update.

    Args:
        tasks: names of all tasks of the run; eval_only tasks take no steps.
        remedy: second part of the message about gradients.
        world: number of ranks.
        device: device of the losses, such as ``cuda:0``.
    """

    def __init__(self, tasks: Iterable[str], remedy: str, world: int, device: torch.device) -> None:
        self.counts = {name: TaskCounts() for name in tasks}
        self._index = {name: number for number, name in enumerate(self.counts)}
        self._remedy, self._world = remedy, world
        self._consecutive = 0
        self._unread: list[_UnreadStep] = []
        # This rank's rows since the last sum over ranks.
        self._rows = torch.zeros(len(self.counts), dtype=torch.int64, device=device)

    def add_outputs(self, task: Task, outputs: Mapping[str, Tensor], batch: Batch) -> None:
        """Count this rank's rows of a batch that cannot be aligned.

        Args:
            task: task whose rows the batch has.
            outputs: named tensors of the model.
            batch: this rank's rows.
        """
        untaught = head_class(task).count_untaught(outputs, batch.targets)
        if untaught is not None and not batch.is_padding:
            self._rows[self._index[batch.task]] += untaught

    def add_step(self, task: str, rows: int, is_finite: Tensor, step: int) -> None:
        """Remember a step until :meth:`reduce` counts it.

        Args:
            task: name of that of the step; a step of several tasks is added for each.
            rows: number of the task's rows, of all ranks.
            is_finite: scalar bool, equal on all ranks; the gradient was finite, so the weights
                were updated.
            step: number of the step.
        """
        self._unread.append(_UnreadStep(task, rows, step, is_finite))

    def _count_unread(self) -> None:
        """Count the remembered steps, up to the first that exceeds a limit."""
        unread, self._unread = self._unread, []
        if unread:
            # One copy to the host for all steps.
            flags = torch.stack([each.is_finite for each in unread]).tolist()
            for each, is_finite in zip(unread, flags, strict=True):
                self._count_step(each.task, each.rows, is_finite, each.step)

    def _count_step(self, task: str, rows: int, is_finite: bool, step: int) -> None:
        counts = self.counts[task]
        counts.steps += 1
        counts.rows += rows
        if is_finite:
            counts.consecutive = self._consecutive = 0
            return
        counts.nonfinite_steps += 1
        counts.consecutive += 1
        self._consecutive += 1
        failed = counts.nonfinite_steps
        if self._consecutive >= MAX_NONFINITE_STEPS:
            problem = f"since step {step - self._consecutive + 1}"
        elif counts.consecutive >= MAX_NONFINITE_STEPS:
            problem = f"in the last {counts.consecutive} steps of this task, until step {step}"
        elif failed > max(MAX_NONFINITE_STEPS, MAX_NONFINITE_FRACTION * counts.steps):
            problem = f"in {failed} of the {counts.steps} steps of this task"
        else:
            return
        raise NonFiniteGradientError(
            f"{task}: the gradient is not finite {problem}; {self._remedy}"
        )

    def reduce(self) -> None:
        """Count the steps since the last call, and sum the counted rows over ranks.

        All ranks must call it together. All see the same flags, so all stop at the same step.

        Raises:
            NonFiniteGradientError: a limit is exceeded.
        """
        self._count_unread()
        if self._world > 1:
            dist.all_reduce(self._rows)
        for counts, rows in zip(self.counts.values(), self._rows.tolist(), strict=True):
            counts.unalignable_rows += rows
        self._rows.zero_()

    @property
    def has_idle_task(self) -> bool:
        """Whether a task has taken no step, so that its weights are those of the start."""
        return not all(counts.steps for counts in self.counts.values())

    def mark_inherited(self, tasks: Iterable[str]) -> None:
        """Record that tasks started from weights that are trained for them.

        Args:
            tasks: their names.
        """
        for name in tasks:
            self.counts[name].is_inherited = True

    def check_trained(self, min_steps: int = 1) -> None:
        """Check that at least one step of each task could change its weights.

        Args:
            min_steps: tasks with fewer steps are not checked.

        Raises:
            UserError: a task is untrained.
        """
        for name, counts in self.counts.items():
            reason = counts.untrained_reason if counts.steps >= min_steps else None
            if reason is not None and counts.nonfinite_steps == counts.steps:
                raise NonFiniteGradientError(f"{name} is untrained: {reason}; {self._remedy}")
            if reason is not None:
                raise UserError(
                    f"{name} is untrained: {reason}. Check the transcripts, or lower "
                    "model.mel_stack"
                )

    def collect_metrics(self) -> dict[str, float]:
        """Return the counts of problems that are not zero, named ``task/metric``."""
        return {
            f"{name}/{key}": float(value)
            for name, counts in self.counts.items()
            for key, value in asdict(counts).items()
            if key in ("nonfinite_steps", "unalignable_rows") and value
        }

    def format_problems(self) -> str:
        """Return the problems as an appendix to the line of losses; "" without any."""
        parts = [f"{name}: {c.problems}" for name, c in self.counts.items() if c.problems]
        return f" ({'; '.join(parts)})" if parts else ""

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return task -> counts as plain types."""
        return {name: asdict(counts) for name, counts in self.counts.items()}

    def checkpoint_state(self) -> dict[str, Any]:
        """Return further keys of ``state.json``: none if all tasks take steps without problems.

        The checkpoints of a healthy run therefore do not depend on these counts.
        """
        is_needed = self.has_idle_task or self.collect_metrics()
        return {STATE_KEY: self.to_dict()} if is_needed else {}

    def restore(
        self, state: Mapping[str, Any], steps: Mapping[str, int], rows: Mapping[str, int]
    ) -> None:
        """Continue the counts of a checkpoint.

        Args:
            state: content of ``state.json``.
            steps: task -> steps until the checkpoint.
            rows: task -> rows of a global batch.

        Raises:
            UserError: the counts are damaged.
        """
        try:
            stored = parse_task_counts(state.get(STATE_KEY, {}))
        except ValueError as error:
            raise UserError(
                f"state.json of the checkpoint: {error}; remove the checkpoint"
            ) from None
        for name, count in steps.items():
            # Without problems a checkpoint has no counts; they follow from the step.
            fresh = TaskCounts(steps=count, rows=count * rows[name])
            self.counts[name] = stored.get(name, fresh)
