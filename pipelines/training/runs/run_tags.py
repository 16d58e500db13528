"""Tags of the MLflow run of a training run, which the list of runs shows."""

from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.tracking.backend import SYSTEM_TAG, TASKS_TAG


def describe_run(config: FinetuneConfig) -> dict[str, str]:
    """Return the tags of a run: its system, and the tasks that it trains, or else measures.

    Args:
        config: settings of the run.
    """
    return {SYSTEM_TAG: config.system, TASKS_TAG: ", ".join(config.trained or config.measured)}
