"""Trainable weights of a run: all that its tasks activate, or only some files of the model.

A weight outside ``training.trainable`` is used but frozen: it has no gradient, so the optimizer,
gradient clipping, the gradient sums and the weight average never change it.
"""

from torch import nn

from pipelines.training.config.run import FinetuneConfig
from skillnet.multitask_model import TaskModel
from skillnet_platform.errors import UserError, suggest_name

NamedParameters = list[tuple[str, nn.Parameter]]


def trainable_parameters(model: TaskModel, config: FinetuneConfig) -> dict[str, NamedParameters]:
    """Freeze the files outside ``training.trainable``; return the trainable parameters by task.

    Args:
        model: its ``requires_grad`` flags are set.
        config: settings of the run.

    Returns:
        Task -> names and tensors that its steps change.

    Raises:
        UserError: the model has no such file, or a task has no weight to train.
    """
    trainable = set(config.training.trainable)
    files = model.files_of()
    for file in sorted(trainable - files.keys()):
        suggestion = suggest_name(file, files)
        raise UserError(f"training.trainable: the model has no file {file!r}{suggestion}")
    for file, names in files.items():
        for name in names:
            model.get_parameter(name).requires_grad_(not trainable or file in trainable)
    active = {
        task: [(name, p) for name, p in model.active_parameters(task) if p.requires_grad]
        for task in config.trained
    }
    for task, named in active.items():
        if not named:
            required = ", ".join(sorted(model.required_files(task)))
            raise UserError(
                f"training.trainable leaves nothing to train for {task}, which activates {required}"
            )
    return active
