"""Check a pretraining and turn it into a joint training run.

Called by ``skillnet pretrain`` and by the trials of a study that start from a pretraining.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus

#: A split of this name is for pretraining too, but only for tasks that name it: masked tasks do not
#: read its rows, which repeat those of the other splits.
PAIRS_PREFIX = "pretrain_"


def build_joint_run(config: FinetuneConfig) -> FinetuneConfig:
    """Return the training run of a pretraining, after checks of its tasks and splits.

    Args:
        config: a pretraining, or the joint run of one.

    Raises:
        UserError: a task learns from labels, or a split is not allowed for pretraining.
    """
    from pipelines.training.loop.setup import open_corpora

    joint = config.joint()
    check_unlabelled_tasks(joint)
    check_pretraining_splits(joint, open_corpora(joint))
    return joint


def check_unlabelled_tasks(config: FinetuneConfig) -> None:
    """Raise UserError if a task of the run learns from labels."""
    from skillnet.objectives.base import find_objective
    from skillnet.skills import find_task

    for name in config.tasks:
        objective = find_task(name, config.model.tasks).objective
        if not find_objective(objective).can_pretrain:
            raise UserError(
                f"tasks.{name} learns from labels ({objective}); pretraining takes masked tasks "
                f"and pairs. Leave it out with --tasks.{name} null, or use skillnet finetune"
            )


def check_pretraining_splits(
    config: FinetuneConfig, corpora: "Mapping[str, PreparedCorpus]"
) -> None:
    """Raise UserError if a run reads a split that its corpus reserves, such as test.

    Args:
        config: the joint run.
        corpora: name -> prepared corpus; each manifest lists the splits for pretraining.
    """
    from pipelines.training.loading.task_columns import PRETRAINING, resolve_splits

    for name, settings in config.tasks.items():
        corpus = corpora[settings.corpus]
        allowed = resolve_splits(corpus, PRETRAINING)
        for split in resolve_splits(corpus, settings.split):
            if split not in allowed and not split.startswith(PAIRS_PREFIX):
                raise UserError(
                    f"tasks.{name}.split: the manifest of {corpus.name} allows "
                    f"{', '.join(allowed)} for pretraining, not {split}"
                )
