"""Number of outputs of a task: the number of classes or symbols of its corpus."""

from collections.abc import Mapping
from typing import Any

from skillnet.skills import Task

#: Objective -> key of a manifest that lists the meaning of each output.
LISTED = {"classification": "labels", "ctc": "symbols"}


def num_outputs_of(manifest: Mapping[str, Any], task: Task) -> int | None:
    """Return the number of outputs that a task needs for a corpus; None if unknown.

    Args:
        manifest: of the corpus.
        task: its objective decides which list counts.
    """
    listed = manifest.get(LISTED.get(task.objective, ""))
    return len(listed) if isinstance(listed, list) else None
