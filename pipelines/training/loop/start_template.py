"""Settings of a new task that starts from a dense model or a library's checkpoint.

:func:`add_start` is the library of ``skillnet init-task --from``. The file that it completes trains
the task without another setting.
"""

import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.data.preprocessing.task_template import TaskTemplate
from pipelines.training.config.run import FinetuneConfig, PretrainConfig
from pipelines.training.loop.init_from import (
    describe_needed_settings,
    find_needed_settings,
    find_origin,
    format_corpus_sizes,
    starts_skills,
)
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from pipelines.training.runs.model_source import resolve_model
from skillnet.objectives.base import find_objective
from skillnet.serialization import read_about, read_config, read_manifest
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError

#: Peak rate of training that keeps what the weights know (docs/results/published-start.md).
START_LR = 1e-4


def add_start(template: TaskTemplate, address: str) -> TaskTemplate:
    """Return a template whose task starts from existing weights.

    Args:
        template: task that starts from random weights.
        address: dense run, folder of a checkpoint, or ``owner/name`` on the Hugging Face hub.

    Raises:
        UserError: there are no such weights, no setting makes them fit, or the corpus was prepared
            for other weights; names what to prepare.
    """
    given = str(Path(address).absolute()) if Path(address).is_dir() else address
    settings = template.settings | {"init_from": given, "training": {"lr": START_LR}}
    run = _resolve_template(replace(template, settings=settings))
    location = f"--from {find_origin(str(run.config.init_from))}"
    source = resolve_model(str(run.config.init_from))
    manifest = read_manifest(source.weights)
    system = read_about(source.weights, manifest).get("system", "skillnet")
    if not starts_skills(system, run.config):
        raise UserError(
            f"{location} holds a model of the system {system!r}, whose run states its settings. "
            "Give a dense run or a checkpoint of transformers or timm, or add the task with "
            "skillnet grow"
        )
    start, _, _ = read_config(source.weights, manifest)
    describe_needed_settings(run.config, start, location)  # raises if no setting makes it fit
    needed = find_needed_settings(run.config, start)
    model = template.settings["model"] | {
        key.removeprefix("model."): value
        for key, value in needed.items()
        if key.startswith("model.") and not key.startswith("model.tasks.")
    }
    made = replace(template, settings=settings | {"model": model})
    _resolve_template(made).check_init_settings()
    *prepare, train = template.commands
    if prepare:
        task = run.config.model.tasks[template.name]
        stems = {stem for each in start.tasks.values() for stem in each.stems}
        modalities = [plan.modality for plan in task.towers.values()]
        sizes = format_corpus_sizes(needed, [(template.corpus, each) for each in modalities])
        words = [*prepare, *([sizes] if sizes else [])]
        if "token" in stems & set(task.stems):
            words.append(f"--tokenizer {shlex.quote(given)}")
        made = replace(made, commands=(" ".join(words), train))
    return made


def _resolve_template(template: TaskTemplate) -> ResolvedRun:
    """Return the run that the command of a template trains."""
    is_masked = not find_objective(template.objective).has_labels
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(template.to_yaml())
        file.flush()
        words = ["--config", "small", "--config", file.name]
        config: Any = configuration.parse_config(
            PretrainConfig if is_masked else FinetuneConfig, words, "skillnet init-task"
        )
    return resolve_run(config.joint() if is_masked else config)
