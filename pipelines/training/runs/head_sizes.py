"""Number of outputs of a task: the number of classes or symbols of its corpus."""

from collections.abc import Mapping
from typing import Any

from skillnet.objectives.base import find_objective
from skillnet.skills import Task


def num_outputs_of(manifest: Mapping[str, Any], task: Task) -> int | None:
    """Return the number of outputs that a task needs for a corpus; None if unknown.

    Args:
        manifest: parsed ``manifest.json`` of the corpus.
        task: its objective decides which list counts.
    """
    names = manifest.get(outputs_key(task) or "")
    return len(names) if isinstance(names, list) else None


def outputs_key(task: Task) -> str | None:
    """Return the key of a manifest that lists the meaning of each output, None without outputs.

    Args:
        task: its objective decides.
    """
    return find_objective(task.objective).listed
