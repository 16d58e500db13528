"""Steps of ``skillnet merge``: read the models, name the corpora of all tasks, compare outputs."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.growth import MergeConfig
from pipelines.training.config.run import FinetuneConfig, TaskTraining
from pipelines.training.evaluation import tables
from pipelines.training.evaluation.evaluator import (
    choose_splits,
    evaluate_model,
    locate_task_corpus,
)
from pipelines.training.evaluation.outcomes import OutcomeTable
from pipelines.training.growth.report import MergedFile, MergeReport, TaskComparison
from pipelines.training.growth.verification import digest_outputs
from pipelines.training.runs import model_source
from pipelines.training.runs.identity import find_identity_differences
from pipelines.training.runs.layout import CONFIG, RESULT, is_unused, read_result
from pipelines.training.runs.model_source import ModelSource
from pipelines.training.runs.vocabulary_match import align_outputs
from skillnet.model_merging import MergeParent, MergePlan, read_parent
from skillnet.multitask_model import TaskModel
from skillnet.serialization import read_manifest
from skillnet_platform.config import build_config, load_yaml
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root, scratch_directory
from skillnet_platform.storage.location import join_location, parse_location

#: Configuration of a merge, in the folder of its run.
MERGE_FILE = "merge.yaml"


@dataclass(frozen=True)
class MergeSource:
    """One of the models of a merge.

    Args:
        source: the model, as the user named it.
        parent: its files, with the new names.
        renames: old name -> new name.
    """

    source: ModelSource
    parent: MergeParent
    renames: Mapping[str, str]

    @property
    def tasks(self) -> dict[str, str]:
        """Task of the model -> its name in the merged model."""
        old_names = {new: old for old, new in self.renames.items()}
        return {old_names.get(task, task): task for task in self.parent.config.tasks}


@contextlib.contextmanager
def open_merge_sources(
    config: MergeConfig, resolved: Sequence[ModelSource], scratch: Path
) -> Iterator[list[MergeSource]]:
    """Check the models of a merge, and rename their skills and tasks.

    A checkpoint with averaged weights has no files that a merge can copy. It is saved as a model
    first.

    Args:
        config: settings of the merge.
        resolved: its models, in order.
        scratch: path beside which these models lie while the block runs.

    Raises:
        UserError: a model is named twice or damaged, or no model has a renamed skill.
    """
    for source in resolved:
        source.require_own_splits("The evaluation of a merged model")
    if len({source.weights for source in resolved}) < len(resolved):
        raise UserError(f"{', '.join(config.models)}: a model is named twice")
    with scratch_directory(scratch) as folder:
        sources = []
        found: set[str] = set()
        for position, source in enumerate(resolved):
            weights = source.weights
            listed = read_manifest(weights)["files"]
            if any(name.startswith("average-") for name in listed):
                weights = folder / f"{position}"
                model_source.load_source_model(source).cpu().save_pretrained(weights)
            present = read_parent(weights, source.name).config
            wanted = config.renames_of(position)
            # A rename without a model number concerns those models that have the name.
            renames = {
                old: new
                for old, (new, must_have) in wanted.items()
                if must_have or old in present.skills or old in present.tasks
            }
            found |= renames.keys()
            sources.append(MergeSource(source, read_parent(weights, source.name, renames), renames))
        for old in {
            old for position in range(len(resolved)) for old in config.renames_of(position)
        }:
            if old not in found:
                raise UserError(
                    f"rename {old}: no model after the first has a skill or task {old!r}"
                )
        yield sources


def build_merged_config(
    config: MergeConfig, sources: list[MergeSource], plan: MergePlan
) -> FinetuneConfig:
    """Return the configuration of the merged model's run: its tasks are evaluated, not trained.

    Args:
        config: settings of the merge.
        sources: its models.
        plan: files and tasks of the merge.

    Raises:
        UserError: the corpus of a task is unknown.
    """
    tasks: dict[str, TaskTraining] = {}
    for source in sources:
        trained = source.source.settings.get("tasks") or {}
        for old, new in source.tasks.items():
            if new in tasks:
                continue
            settings = trained.get(old) or {}
            corpora = ({new: settings["corpus"]} if settings else {}) | config.corpora
            corpus = locate_task_corpus("", new, corpora)
            tasks[new] = TaskTraining(
                Path(str(corpus)).name, max_length=settings.get("max_length"), eval_only=True
            )
    digests: dict[str, str | None] = {}
    for name in {task.corpus for task in tasks.values()}:
        # A missing corpus is an error when it is evaluated: a finished merge needs none.
        with contextlib.suppress(ValueError, OSError):
            data = parse_location(config.data, data_root())
            digests[name] = open_corpus(join_location(data, name)).digest
    return FinetuneConfig(
        name=config.name or time.strftime("merge-%Y%m%d-%H%M%S"),
        run_dir=config.run_dir,
        data=config.data,
        corpora=digests,
        model=plan.config,
        tasks=tasks,
        tracking=config.tracking,
    )


def require_merge_folder(folder: Path) -> None:
    """Raise UserError if a folder is in use by another run than a merge.

    Args:
        folder: location of the run of a merge.
    """
    if not is_unused(folder) and not (folder / MERGE_FILE).is_file():
        raise UserError(f"{folder}: a run of this name exists; choose another --name")


def check_same_merge(
    config: MergeConfig, settings: FinetuneConfig, folder: Path, parents: list[str]
) -> None:
    """Check that an existing folder is of the same merge.

    Args:
        config: settings of this call.
        settings: result of :func:`build_merged_config`.
        folder: directory of the run.
        parents: digests of the models, in order.

    Raises:
        UserError: it is another run, or a merge with other models, options or corpora.
    """
    require_merge_folder(folder)
    stored = folder / MERGE_FILE
    before = build_config(MergeConfig, load_yaml(stored))
    options = ("rename", "without", "average_shared")
    differing = {
        key: (getattr(before, key), getattr(config, key))
        for key in options
        if getattr(before, key) != getattr(config, key)
    }
    result = folder / RESULT
    if result.is_file():
        # A model may have moved, so the weights decide.
        joined = [str(each["digest"]) for each in read_result(result).get("parents", [])]
        is_same = joined == parents
    else:
        is_same = before.models == config.models
    if not is_same:
        differing["models"] = before.models, config.models
    # Other options change the settings, which would only lengthen the message.
    if not differing and (folder / CONFIG).is_file():
        made = build_config(FinetuneConfig, load_yaml(folder / CONFIG))
        differing = find_identity_differences(made, settings)
    for key, (old, new) in differing.items():
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"the merge {settings.name} has {key} {old}, not {new}{more}; give another --name"
        )


def build_merge_report(
    sources: list[MergeSource],
    plan: MergePlan,
    settings: FinetuneConfig,
    weights: Path,
    on_split: Callable[[str, str, int], None],
    outcomes: OutcomeTable | None = None,
) -> tuple[MergeReport, list[dict[str, Any]]]:
    """Evaluate every task of every model before and after the merge, on every test row.

    Args:
        sources: models of the merge.
        plan: files and tasks of the merge.
        settings: result of :func:`build_merged_config`.
        weights: folder of the merged model.
        on_split: called before each pass over a split with the task, the split and its rows.
        outcomes: receives the outcome of every row of the merged model.

    Returns:
        The report, and the evaluation rows of the merged model.
    """
    merged = model_source.load_source_model(ModelSource(str(weights), weights))
    corpora = {name: task.corpus for name, task in settings.tasks.items()}
    limits = {name: task.max_length for name, task in settings.tasks.items()}
    rows = evaluate_model(
        merged,
        str(settings.data),
        corpora=corpora,
        limits=limits,
        on_split=on_split,
        outcomes=outcomes,
    )

    # Parents share the tasks of their base, whose outputs after the merge are computed once.
    @functools.cache
    def digest_merged(task: str, split: str) -> str:
        corpus = open_corpus(locate_task_corpus(str(settings.data), task, corpora))
        return digest_outputs(merged, task, corpus, split, limits[task])

    comparisons: list[TaskComparison] = []
    for source in sources:
        model = model_source.load_source_model(source.source)
        for old, new in source.tasks.items():
            comparisons += _compare_task(
                source, model, digest_merged, (old, new), settings, rows, on_split
            )
    files = read_manifest(weights)["files"]
    report = MergeReport(
        parents={source.source.name: source.source.digest for source in sources},
        total_params=sum(p.numel() for p in merged.parameters()),
        files=[
            MergedFile(
                file,
                [parent.name for parent in owners],
                files[f"{file}.safetensors"]["sha256"],
                file in plan.averaged,
            )
            for file, owners in plan.origins.items()
        ],
        tasks=comparisons,
    )
    return report, rows


def _compare_task(
    source: MergeSource,
    model: TaskModel,
    digest_merged: Callable[[str, str], str],
    names: tuple[str, str],
    settings: FinetuneConfig,
    rows: list[dict[str, Any]],
    on_split: Callable[[str, str, int], None],
) -> Iterator[TaskComparison]:
    """Yield the comparison of one task of a model, for each split."""
    old, new = names
    task = settings.tasks[new]
    corpus = open_corpus(locate_task_corpus(str(settings.data), new, {new: task.corpus}))
    align_outputs(model, old, corpus)
    spec = model.config.tasks[old]
    metric, _ = tables.primary_metric(spec.objective)
    for split in choose_splits(corpus, None, task=spec):
        count = corpus.splits[split].rows
        on_split(new, split, count)
        before = digest_outputs(model, old, corpus, split, task.max_length)
        is_identical = before == digest_merged(new, split)
        row = tables.find_row(rows, new, metric, split=split)
        value = float("nan") if row is None else float(row["value"])
        before_value = value
        # Equal outputs have equal metrics, so only a changed task is evaluated again.
        if not is_identical:
            own = evaluate_model(
                model,
                str(settings.data),
                [old],
                [split],
                corpora={old: task.corpus},
                limits={old: task.max_length},
                bootstrap_samples=0,
            )
            found = tables.find_row(own, old, metric, split=split)
            before_value = float("nan") if found is None else float(found["value"])
        yield TaskComparison(
            source.source.name, new, split, count, is_identical, metric, before_value, value
        )
