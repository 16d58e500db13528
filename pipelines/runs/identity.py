"""TODO: pipelines.runs.identity."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.config.run import FinetuneConfig
from pipelines.runs.model_source import Source
from skillnet_platform import config as configuration

#: Keys of ``training`` that decide where and how often, not what.
RHYTHM = (
    "minutes",
    "workers",
    "min_workers",
    "regrow_seconds",
    "threads_per_worker",
    "use_gpu",
    "placement",
    "precision",
    "checkpoint_every",
    "keep",
    "evaluate_every",
    "log_every",
    "bucket_mb",
    "max_failures",
)


def identity_of(config: FinetuneConfig) -> dict[str, Any]:
    """What decides the weights: the configuration without names, places and rhythm."""
    training = {k: v for k, v in asdict(config.training).items() if k not in RHYTHM}
    return {
        "seed": config.seed,
        "init_from": digest_of(config.init_from),
        "system": config.system,
        "options": config.options,
        "model": configuration.to_dict(config.model),
        "tasks": configuration.to_dict(config.tasks),
        "training": training,
    }


def digest_of(weights: str | None) -> str | None:
    """Digest of the weights that a run starts from: what its identity hangs on, not their place."""
    if not weights:
        return None
    return Source(weights, Path(weights)).digest
