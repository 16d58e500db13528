"""``skillnet pretrain``: train the skills on unlabelled rows, with the same sparse activation.

Each step hides a part of the rows of one modality and asks for it: tokens of text and code,
patches of pictures, spans of sound, tubelets of clips. A step activates the general skill and
that of its modality, and nothing else. With ``contrastive`` steps on the pairs that corpora hold
join in. Folder, record, resuming and workers are those of ``skillnet finetune``, which starts
from the result with ``--from``.
"""

from typing import Any

from pipelines.config.resources import request_training
from pipelines.config.run import PretrainConfig
from pipelines.finetune import print_result, run_end_to_end
from pipelines.training.pretraining import build_joint_run
from skillnet_platform.cli import command

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
    return run_end_to_end(build_joint_run(config), "pretrain", SPLITS)


@command(
    PretrainConfig,
    description="Train the skills on unlabelled rows: a part of each row is hidden and "
    "restored, one modality a step, only its skills computed and updated. Then "
    "`skillnet finetune --from NAME`.",
    example="skillnet pretrain --config pretrain --name first-pretraining\n"
    "skillnet finetune --config quickstart --from first-pretraining",
    show=lambda result: print_result(result, f"next: skillnet finetune --from {result['name']}"),
    resources=request_training,
)
def main(config: PretrainConfig) -> dict[str, Any]:
    """Run ``skillnet pretrain``."""
    return pretrain(config)


if __name__ == "__main__":
    raise SystemExit(main())
