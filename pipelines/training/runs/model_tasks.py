"""Tasks of a run's model: those of its configuration, with the outputs of their corpora.

:func:`resolve_model_tasks` is called once per run, before its identity is computed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.training.config.run import FinetuneConfig
from skillnet.objectives.base import find_objective
from skillnet.skills import Task, known_tasks
from skillnet_platform import console


def resolve_model_tasks(
    config: FinetuneConfig, manifests: Mapping[str, Mapping[str, Any]]
) -> FinetuneConfig:
    """Give the model the tasks of the run, and no others, with the outputs of their corpora.

    A task without a plan in ``model.tasks`` gets the plan of the known task of its name, or of the
    task that its corpus was prepared for. A number of outputs in the configuration stays, and
    validation rejects it if the corpus has another one.

    Args:
        config: settings of a run.
        manifests: corpus name -> manifest, of the corpora that could be opened.
    """
    configured, known = config.model.tasks, known_tasks()
    tasks: dict[str, Task] = {}
    # The order of ``model.tasks`` decides the order of initialization.
    for name in sorted(config.tasks, key=[*configured, *config.tasks].index):
        corpus = config.tasks[name].corpus
        manifest = manifests.get(corpus, {})
        usual = known.get(name) or known.get(str(manifest.get("task")))
        task = configured.get(name) or usual
        if task is None:
            continue
        tasks[name] = task
        outputs = find_objective(task.objective).count_names(manifest)
        # Only defaults are replaced: a number in the configuration is a decision of the user.
        is_default = (
            not task.outputs
            or name not in configured
            or (name in known and task.outputs == known[name].outputs)
        )
        if outputs and outputs != task.outputs and is_default:
            console.print_note(f"{name}: {outputs} outputs, as in {corpus}")
            tasks[name] = replace(task, outputs=outputs)
    # Validation reports a task without a plan.
    return replace(config, model=replace(config.model, tasks=tasks)) if tasks else config
