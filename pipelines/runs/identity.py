"""Identity of a run: the part of its configuration that determines the weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.config.run import FinetuneConfig
from pipelines.runs.model_source import ModelSource
from skillnet_platform import config as configuration

#: Keys of ``training`` that change where, how fast and how often, but not the result.
NON_IDENTITY_KEYS = (
    "max_minutes",
    "workers",
    "min_workers",
    "resize_interval_s",
    "threads_per_worker",
    "use_gpu",
    "placement_strategy",
    "precision",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "log_every",
    "bucket_mb",
    "max_failures",
)


def compute_identity(config: FinetuneConfig) -> dict[str, Any]:
    """Return the configuration without names, locations and intervals.

    A run resumes only with an equal identity.

    Args:
        config: of the run, with ``init_from`` as a folder of weights.
    """
    training = {k: v for k, v in asdict(config.training).items() if k not in NON_IDENTITY_KEYS}
    return {
        "seed": config.seed,
        "init_from": digest_weights(config.init_from),
        "system": config.system,
        "options": config.options,
        "model": configuration.to_dict(config.model),
        "tasks": configuration.to_dict(config.tasks),
        "training": training,
    }


def digest_weights(weights: str | None) -> str | None:
    """Return the digest of a folder of weights: a run depends on them, not on their location."""
    if not weights:
        return None
    return ModelSource(weights, Path(weights)).digest
