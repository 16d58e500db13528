"""``skillnet pretrain``: train the skills on unlabelled rows, with the same sparse activation.

Each step masks parts of rows of one modality and predicts them: tokens of text and code, patches
of images, spans of sound, tubelets of videos. A step activates the general skill and the skill of
its modality. With ``contrastive``, steps on pairs of the corpora are added. Folder, record, resume
and workers are those of ``skillnet finetune``, which starts from the result with ``--from``.
"""

from typing import Any

from pipelines.finetune import print_result, run_end_to_end
from pipelines.training.config.resources import request_training
from pipelines.training.config.run import ESSENTIAL_TRAINING_OPTIONS, PretrainConfig
from pipelines.training.loop.resolved_run import build_joint_run
from skillnet_platform.cli import command

#: Pretraining never reads a test split; it evaluates on this split.
EVALUATION_SPLITS = ("validation",)


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain a model on the rows that its corpora allow for pretraining.

    The name of an unfinished run resumes it. The name of a finished run returns its result.

    Args:
        config: settings of the pretraining.

    Returns:
        As :func:`pipelines.finetune.finetune`; ``evaluation`` holds the masked loss of each task
        on validation rows.

    Raises:
        UserError: a task has labels, a split is not for pretraining, or
            :func:`pipelines.finetune.finetune` raises it.
    """
    return run_end_to_end(build_joint_run(config), "pretrain", EVALUATION_SPLITS)


@command(
    PretrainConfig,
    description="Train the skills on unlabelled rows: each step masks parts of rows of one "
    "modality and predicts them; only the skills of that modality are computed and updated. Then "
    "run `skillnet finetune --from NAME`.",
    example="skillnet pretrain --config pretrain --name first-pretraining\n"
    "skillnet finetune --config quickstart --from first-pretraining",
    show=lambda result: print_result(result, f"next: skillnet finetune --from {result['name']}"),
    resources=request_training,
    essential=(
        "name",
        "run_dir",
        "data",
        "init_from",
        "seed",
        "contrastive",
        "views",
        "model.dim",
        "model.num_layers",
        "tasks.NAME.batch_size",
        *ESSENTIAL_TRAINING_OPTIONS,
    ),
)
def main(config: PretrainConfig) -> dict[str, Any]:
    """Run ``skillnet pretrain``."""
    return pretrain(config)


if __name__ == "__main__":
    raise SystemExit(main())
