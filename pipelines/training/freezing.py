"""Which weights a run may change: all that its tasks activate, or only some files of the model.

A weight outside ``training.only`` is read but frozen: no gradient is computed for it, so the
optimiser, gradient clipping, the exchange between workers and the average of weights, which all
go by the parameters given here, never see it.
"""

from torch import nn

from pipelines.config.run import FinetuneConfig
from skillnet.multitask_model import TaskModel
from skillnet_platform.errors import UserError, nearest

Named = list[tuple[str, nn.Parameter]]


def trainable_parameters(model: TaskModel, config: FinetuneConfig) -> dict[str, Named]:
    """Freeze what ``training.only`` leaves out; task -> names and tensors that its steps change.

    Raises:
        UserError: a file that the model does not have, or a task without a weight to train.
    """
    only = set(config.training.only)
    files = model.files_of()
    for file in sorted(only - files.keys()):
        raise UserError(f"training.only: the model has no file {file!r}{nearest(file, files)}")
    for file, names in files.items():
        for name in names:
            model.get_parameter(name).requires_grad_(not only or file in only)
    active = {
        task: [(name, p) for name, p in model.active_parameters(task) if p.requires_grad]
        for task in config.trained
    }
    for task, named in active.items():
        if not named:
            touched = ", ".join(sorted(model.required_files(task)))
            raise UserError(
                f"training.only leaves nothing to train for {task}, which activates {touched}"
            )
    return active
