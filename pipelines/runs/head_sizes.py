"""How many outputs a task has: as many as its corpus has classes or symbols.

The built-in corpora's numbers are the defaults. Another corpus has another number, which its
manifest says: nobody has to write it down.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.config.run import FinetuneConfig
from pipelines.shards.format import MANIFEST
from skillnet.skills import Task, default_tasks
from skillnet_platform import console
from skillnet_platform.storage.location import Place, below, content

#: Objective -> key of a manifest that lists what its outputs mean.
LISTED = {"classification": "labels", "ctc": "symbols"}


def outputs_of(manifest: Mapping[str, Any], task: Task) -> int | None:
    """How many outputs a task needs for a corpus; none where the manifest does not say."""
    listed = manifest.get(LISTED.get(task.objective, ""))
    return len(listed) if isinstance(listed, list) else None


def with_outputs(config: FinetuneConfig, data: Place) -> FinetuneConfig:
    """With as many outputs as the corpora have, where the configuration leaves the default.

    What the configuration names stays, and is refused later if the corpus has another number; so is
    a corpus that cannot be read.

    Args:
        config: of a run.
        data: where its corpora are.
    """
    usual = default_tasks()
    tasks = dict(config.model.tasks)
    for name, settings in config.tasks.items():
        task = tasks.get(name)
        if task is None or name not in usual or task.outputs != usual[name].outputs:
            continue
        found = outputs_of(_manifest(data, settings.corpus), task)
        if found and found != task.outputs:
            console.note(f"{name}: {found} outputs, as {settings.corpus} has")
            tasks[name] = replace(task, outputs=found)
    return replace(config, model=replace(config.model, tasks=tasks))


def _manifest(data: Place, corpus: str) -> dict[str, Any]:
    try:
        found = json.loads(content(below(data, corpus, MANIFEST)) or b"{}")
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}
