"""Proofs that a model computes what another one computes: outputs on equal inputs, bit by bit.

A recipient of a model may have no corpora, so inputs are generated from a seed. Every program
generates the same ones. Where the corpus of a task is at hand, rows of it take their place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from skillnet.config import SkillNetConfig
from skillnet.modality import find_modality
from skillnet.multitask_model import Batch, TaskModel
from skillnet.skills import SkillPlan, Task

#: Rows of generated inputs on which outputs are compared, and start of their random numbers.
PROBE_ROWS, PROBE_SEED = 16, 20221
#: Inputs of a :class:`TaskProof` that are generated.
GENERATED = "generated"


@dataclass(frozen=True)
class RowDigests:
    """Outputs of a task on rows of a corpus.

    Args:
        inputs: corpus and split.
        digests: hash of the output of each row.
    """

    inputs: str
    digests: list[bytes]


#: Returns the outputs of a task of a model on rows; None if no corpus is at hand.
RowReader = Callable[[TaskModel, str], RowDigests | None]


@dataclass(frozen=True)
class TaskProof:
    """Comparison of the outputs of a task before and after a change of the model.

    Args:
        task: that was compared; of a new task, with the outputs of the author.
        rows: number of compared inputs.
        differing: rows with an output that is not equal in every bit.
        largest: largest difference, relative to the largest output or 1.
        flops: operations of one example.
        parameters: that the task activates.
        package: that brought the task; None for an old task.
        inputs: ``generated``, or corpus and split of the rows.
    """

    task: str
    rows: int
    differing: int
    largest: float
    flops: int
    parameters: int
    package: str | None = None
    inputs: str = GENERATED


def make_example_batch(
    plan: SkillPlan,
    config: SkillNetConfig,
    rows: int = 3,
    seed: int = 0,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Batch:
    """Return random inputs of a tower, the first row as long as the model reads.

    Args:
        plan: active skills of the tower.
        config: sizes of the inputs.
        rows: B.
        seed: start of the random numbers of the values and lengths.
        settings: preprocessing of the task's corpus.
    """
    draw = torch.Generator().manual_seed(seed)
    half = find_modality(plan.modality).tensor_half
    batch: Batch = half.make_example(config, rows, draw=draw, settings=settings)
    return batch


@torch.no_grad()
def probe_outputs(model: TaskModel, tasks: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Return task -> outputs on generated inputs, which every program generates alike.

    Args:
        model: in evaluation mode.
        tasks: names of tasks of the model.
    """
    found = {}
    for task in tasks:
        spec: Task = model.config.tasks[task]
        towers = {
            tower: make_example_batch(plan, model.config, PROBE_ROWS, PROBE_SEED)
            for tower, plan in spec.towers.items()
        }
        some = next(model.parameters())
        placed = {
            tower: {
                name: x.to(some.device, some.dtype if x.is_floating_point() else None)
                for name, x in batch.items()
            }
            for tower, batch in towers.items()
        }
        # The complete task with its head, as a user gets it.
        outputs = model(task, placed)
        found[task] = {name: x.detach().cpu().contiguous() for name, x in outputs.items()}
    return found


#: Task -> its outputs: by name on generated inputs, or on rows of a corpus.
TakenOutputs = Mapping[str, Mapping[str, Tensor] | RowDigests]


def take_outputs(model: TaskModel, read_rows: RowReader | None = None) -> TakenOutputs:
    """Return the outputs of all tasks of a model: on rows at hand, or on generated inputs.

    Args:
        model: in evaluation mode.
        read_rows: computes outputs on rows.
    """
    rows = {task: read_rows(model, task) if read_rows else None for task in model.config.tasks}
    probes = probe_outputs(model, [task for task, found in rows.items() if found is None])
    return {task: found or probes[task] for task, found in rows.items()}


def compare_outputs(
    before: TakenOutputs, after: TaskModel, read_rows: RowReader | None = None
) -> list[TaskProof]:
    """Compare the outputs of tasks before and after a change of a model, bit by bit.

    Args:
        before: see :func:`take_outputs`.
        after: the changed model, in evaluation mode. Tasks that it lacks are left out.
        read_rows: as given to :func:`take_outputs`.

    Raises:
        ValueError: an output differs; names the task.
    """
    proofs = []
    tasks = [name for name in before if name in after.config.tasks]
    parameters = _count_parameters(after, tasks)
    for task in tasks:
        taken = before[task]
        if not isinstance(taken, RowDigests):
            found = probe_outputs(after, [task])[task]
            proof = prove_task(after, task, taken, found, parameters=parameters[task])
        else:
            again = read_rows(after, task) if read_rows is not None else None
            pairs = zip_longest(taken.digests, again.digests if again is not None else ())
            proof = TaskProof(
                task,
                len(taken.digests),
                sum(one != other for one, other in pairs),
                0.0,
                after.flops(task)[0],
                parameters[task],
                inputs=taken.inputs,
            )
        if proof.differing:
            raise ValueError(
                f"the outputs of {task} change on {proof.differing} of {proof.rows} rows, "
                "although no weight of it did. Nothing was written"
            )
        proofs.append(proof)
    return proofs


def _count_parameters(model: TaskModel, tasks: Sequence[str]) -> dict[str, int]:
    """Return task -> activated parameters, in a time that grows with the files of the tasks."""
    files, sizes = model.files_of(), {name: p.numel() for name, p in model.named_parameters()}
    return {
        task: sum(
            sizes[name]
            for file in model.required_files(task)
            for name in files.get(file, ())
            if model.uses_parameter(name, task)
        )
        for task in tasks
    }


def prove_task(
    model: TaskModel,
    task: str,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    package: str | None = None,
    parameters: int | None = None,
) -> TaskProof:
    """Compare the outputs of a task row by row.

    Args:
        model: that has the task, for its cost.
        task: name of the task.
        expected: outputs by name.
        found: outputs by name, of the same shapes.
        package: that brought the task.
        parameters: that the task activates; None counts them.
    """
    differs = torch.zeros(PROBE_ROWS, dtype=torch.bool)
    largest = 0.0
    for name, wanted in expected.items():
        here = found[name]
        # A number that is none is equal to itself here.
        unequal = ~((wanted == here) | (wanted.isnan() & here.isnan()))
        # A number of the task, such as the scale of its similarities, belongs to all rows.
        differs |= unequal.reshape(PROBE_ROWS, -1).any(1) if wanted.ndim else unequal
        if wanted.is_floating_point() and unequal.any():
            size = max(float(wanted.abs().nan_to_num(posinf=0.0).max()), 1.0)
            gap = (wanted - here).abs()[unequal].max()
            largest = max(largest, float(gap) / size) if gap == gap else float("nan")
    return TaskProof(
        task,
        PROBE_ROWS,
        int(differs.sum()),
        largest,
        model.flops(task)[0],
        model.activated_parameters(task) if parameters is None else parameters,
        package,
    )
