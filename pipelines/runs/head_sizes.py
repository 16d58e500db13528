"""Number of outputs of a task: the number of classes or symbols of its corpus.

The defaults are those of the built-in corpora. The manifest of another corpus has its own number,
so users need not configure it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.config.run import FinetuneConfig
from skillnet.skills import Task, default_tasks
from skillnet_platform import console

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


def infer_num_outputs(
    config: FinetuneConfig, manifests: Mapping[str, Mapping[str, Any]]
) -> FinetuneConfig:
    """Set the outputs of tasks to those of their corpora, where the configuration has the default.

    A number in the configuration stays; validation rejects it if the corpus has another one.

    Args:
        config: of a run.
        manifests: corpus name -> manifest, of the corpora that could be opened.
    """
    usual = default_tasks()
    tasks = dict(config.model.tasks)
    for name, settings in config.tasks.items():
        task = tasks.get(name)
        # Only defaults are replaced: a number in the configuration is a decision of the user.
        if task is None or name not in usual or task.outputs != usual[name].outputs:
            continue
        outputs = num_outputs_of(manifests.get(settings.corpus, {}), task)
        if outputs and outputs != task.outputs:
            console.print_note(f"{name}: {outputs} outputs, as in {settings.corpus}")
            tasks[name] = replace(task, outputs=outputs)
    return replace(config, model=replace(config.model, tasks=tasks))
