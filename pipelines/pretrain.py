"""``skillnet pretrain``: train the skills on unlabelled rows, with the same sparse activation.

Each step hides a part of the rows of one modality and asks for it: tokens of text and code,
patches of pictures, spans of sound, tubelets of clips. A step activates the general skill and
that of its modality, and nothing else. With ``contrastive`` steps on the pairs that corpora hold
join in. Folder, record, resuming and workers are those of ``skillnet finetune``, which starts
from the result with ``--from``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines import finetune as training
from pipelines.config.run import FinetuneConfig, PretrainConfig
from skillnet_platform.cli import command
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.shards.dataset import PreparedCorpus

#: Pretraining never looks at a test split: what it measures, it measures here.
SPLITS = ("validation",)


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain a model on the rows that its corpora allow for it.

    The name of an unfinished run goes on with it; that of a finished one gives its result.

    Returns:
        As :func:`pipelines.finetune.finetune`; ``evaluation`` holds the masked loss of each task
        on validation rows.

    Raises:
        UserError: a task with labels, a split that is not for pretraining, and whatever
            fine-tuning refuses.
    """
    return training.carry_out(joint_run(config), "pretrain", SPLITS)


def joint_run(config: FinetuneConfig) -> FinetuneConfig:
    """The training run that a pretraining is, after a look at what it would read.

    Raises:
        UserError: see :func:`pretrain`.
    """
    from pipelines.training.setup import open_corpora

    joint = config.joint() if isinstance(config, PretrainConfig) else config
    check_unlabelled(joint)
    check_splits(joint, open_corpora(joint))
    return joint


def check_unlabelled(config: FinetuneConfig) -> None:
    """Refuse tasks that learn from labels: what they give is no pretraining."""
    from skillnet.skills import find_task

    for name in config.tasks:
        objective = find_task(name, config.model.tasks).objective
        if objective not in ("masked", "retrieval"):
            raise UserError(
                f"tasks.{name} learns from labels ({objective}); pretraining takes masked tasks "
                f"and pairs. Leave it out with --tasks.{name} null, or use skillnet finetune"
            )


def check_splits(config: FinetuneConfig, corpora: "Mapping[str, PreparedCorpus]") -> None:
    """Refuse splits that a corpus' manifest does not allow for pretraining: test, validation."""
    from pipelines.loading.task_dataset import PRETRAINING, splits_of

    for name, settings in config.tasks.items():
        corpus = corpora[settings.corpus]
        allowed = splits_of(corpus, PRETRAINING)
        for split in splits_of(corpus, settings.split):
            if split not in allowed:
                raise UserError(
                    f"tasks.{name}.split: the manifest of {corpus.name} allows "
                    f"{', '.join(allowed)} for pretraining, not {split}"
                )


@command(
    PretrainConfig,
    description="Train the skills on unlabelled rows: a part of each row is hidden and "
    "restored, one modality a step, only its skills computed and updated. Then "
    "`skillnet finetune --from NAME`.",
    example="skillnet pretrain --config pretrain --name first-pretraining\n"
    "skillnet finetune --config quickstart --from first-pretraining",
    show=lambda result: training.show_run(
        result, f"go on with: skillnet finetune --from {result['name']}"
    ),
)
def main(config: PretrainConfig) -> dict[str, Any]:
    """Run ``skillnet pretrain``."""
    return pretrain(config)


if __name__ == "__main__":
    raise SystemExit(main())
