"""Scale of the values of a regression, as the manifest of its corpus records it."""

from collections.abc import Mapping
from typing import Any

from skillnet.objectives.base import find_objective
from skillnet.skills import Task
from skillnet.vocabulary import parse_scale


def read_value_scale(manifest: Mapping[str, Any], task: Task) -> tuple[float, float] | None:
    """Return mean and deviation of a regression's training values; None for other tasks.

    Args:
        manifest: parsed ``manifest.json`` of the corpus.
        task: its objective decides.

    Raises:
        ValueError: the manifest has no usable scale.
    """
    if not find_objective(task.objective).has_scale:
        return None
    return parse_scale(manifest.get("value_scale"), f"{manifest.get('corpus')}: value_scale")
