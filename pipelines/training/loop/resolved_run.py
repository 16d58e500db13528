"""A training run with its inputs: corpora, batches, initial weights and identity.

A command resolves a configuration once (:func:`resolve_run`), validates it
(:mod:`pipelines.training.loop.run`) and passes the same object to the training loop. A Ray worker
is another process: it receives the resolved configuration and opens its own inputs.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.training.config.run import FinetuneConfig
from skillnet.objectives.base import find_objective
from skillnet.skills import Task, find_task, known_tasks
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root, run_root
from skillnet_platform.storage.location import join_location, parse_location

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus
    from pipelines.training.loading.dataloader import MultiTaskDataLoader
    from pipelines.training.loop.init_from import InitReport
    from skillnet.multitask_model import TaskModel


@dataclass(frozen=True)
class InProcessParts:
    """Objects of this process that a run trains with; a configuration cannot name them.

    Args:
        model: is trained in place; None builds the model of the configuration.
        losses: task -> loss in place of the one of its objective: maps outputs and targets of B
            rows to their mean, a tensor ().
        loggers: receivers of metrics beside those that the configuration names, each a
            ``pipelines.training.loop.reporter.RunLogger``.
    """

    model: "TaskModel | None" = None
    losses: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    loggers: Sequence[Any] = ()


class ResolvedRun:
    """A configuration, the run's folder, and everything that is read to train it.

    Inputs are opened at their first use and at most once. A finished run needs none of them.

    Args:
        config: with a name and absolute paths, see :func:`resolve_run`.
        folder: directory of the run; checkpoints are written and resumed there. None keeps nothing
            on disk.
        corpora: opened corpora; others are opened when they are needed.

    Attributes:
        parts: objects of this process; workers of Ray have none.
    """

    parts = InProcessParts()

    def __init__(
        self,
        config: FinetuneConfig,
        folder: Path | None = None,
        corpora: "Mapping[str, PreparedCorpus] | None" = None,
    ) -> None:
        self.config = config
        self._folder = folder
        self.opened = dict(corpora or {})

    @property
    def has_folder(self) -> bool:
        """Whether the run is kept on disk."""
        return self._folder is not None

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        assert self._folder is not None
        return self._folder

    @cached_property
    def corpora(self) -> "dict[str, PreparedCorpus]":
        """Corpus name -> opened corpus, of all tasks.

        Raises:
            UserError: a corpus is missing, or its vocabulary is larger than the model's.
        """
        from pipelines.training.runs.identity import open_corpora

        return open_corpora(self.config, self.opened)

    @property
    def manifests(self) -> dict[str, Mapping[str, Any]]:
        """Corpus name -> manifest."""
        return {name: corpus.manifest for name, corpus in self.corpora.items()}

    @cached_property
    def dataloader(self) -> "MultiTaskDataLoader":
        """Batches of all tasks, a pure function of the step.

        Raises:
            UserError: a corpus does not fit its task, or the cache is too small.
        """
        from pipelines.training.loop.setup import build_dataloader

        return build_dataloader(self.config, self.corpora)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The part of the configuration that determines the weights."""
        from pipelines.training.runs.identity import compute_identity

        return compute_identity(self.config)

    @cached_property
    def identity_digest(self) -> str:
        """SHA-256 of the identity with the digests of all corpora; checkpoints carry it."""
        from pipelines.training.runs.identity import compute_identity
        from skillnet_platform.config import digest_config

        digests: dict[str, str | None] = {n: corpus.digest for n, corpus in self.corpora.items()}
        return digest_config(compute_identity(replace(self.config, corpora=digests)))

    def with_fixed_workers(self) -> "ResolvedRun":
        """Return this run with a fixed number of workers, which its identity does not cover."""
        other = copy.copy(self)
        training = replace(self.config.training, min_workers=None)
        other.config = replace(self.config, training=training)
        return other

    @cached_property
    def init_report(self) -> "InitReport | None":
        """Files that come from ``init_from``, found on a model that is discarded.

        Raises:
            UserError: the weights do not fit.
        """
        from pipelines.training.loop.setup import dry_run_init

        return dry_run_init(self.config, self.corpora)


def resolve_run(config: FinetuneConfig, stage: str = "finetune") -> ResolvedRun:
    """Resolve a configuration: name, absolute paths, tasks, digests, initial weights.

    Workers have working directories of their own, so paths are absolute.

    Args:
        config: from YAML and the command line.
        stage: prefix of a generated name.

    Raises:
        UserError: the name is no folder name, two mirrors are given, or ``init_from`` is not found.
    """
    from pipelines.data.shards.dataset import open_corpus
    from pipelines.training.runs.identity import corpora_of

    folder, storage = parse_location(config.run_dir, run_root()), config.storage
    if isinstance(folder, str):
        if storage.mirror not in (None, folder):
            raise UserError(
                f"run_dir is {folder} and storage.mirror is {storage.mirror}; give only one of them"
            )
        storage = replace(storage, mirror=folder)
        folder = run_root()
    data = parse_location(config.data, data_root())
    corpora = {}
    for name in corpora_of(config):
        # A missing corpus is an error later, when it is needed: a finished run needs none.
        with contextlib.suppress(ValueError, OSError):
            corpora[name] = open_corpus(join_location(data, name))
    # Before the name: the tasks of the model are part of the identity.
    config = resolve_model_tasks(config, {name: c.manifest for name, c in corpora.items()})
    name = config.name or time.strftime(f"{stage}-%Y%m%d-%H%M%S")
    if "/" in name or name in ("", ".", ".."):
        raise UserError(f"name {name!r} is no valid folder name; use letters, digits, - and _")
    init_from = None
    if config.init_from:
        from pipelines.training.loop.init_from import inherit_reference_tasks, resolve_init_weights

        init_from = resolve_init_weights(config.init_from, config.tracking.uri, str(folder))
        config = inherit_reference_tasks(config, init_from)
    # Known only now: the tasks have plans, and initial weights determine the size of a baseline.
    config = config.joint()
    digests = {
        name: config.corpora.get(name) or (corpora[name].digest if name in corpora else None)
        for name in corpora_of(config)
    }
    config = replace(
        config,
        name=name,
        run_dir=str(folder),
        data=str(data),
        corpora={name: digest for name, digest in digests.items() if digest},
        init_from=init_from,
        storage=storage,
    )
    return ResolvedRun(config, Path(folder) / name, corpora)


#: A split of this name is for pretraining too, but only for tasks that name it: masked tasks do not
#: read its rows, which repeat those of the other splits.
PAIRS_PREFIX = "pretrain_"


def build_joint_run(config: FinetuneConfig) -> FinetuneConfig:
    """Return the training run of a pretraining, after checks of its tasks and splits.

    Args:
        config: a pretraining, or the joint run of one.

    Raises:
        UserError: a task learns from labels, or a split is not allowed for pretraining.
    """
    joint = config.joint()
    check_unlabelled_tasks(joint)
    from pipelines.training.runs.identity import open_corpora

    check_pretraining_splits(joint, open_corpora(joint))
    return joint


def check_unlabelled_tasks(config: FinetuneConfig) -> None:
    """Raise UserError if a task of the run learns from labels."""
    for name in config.tasks:
        objective = find_task(name, config.model.tasks).objective
        if not find_objective(objective).can_pretrain:
            raise UserError(
                f"tasks.{name} learns from labels ({objective}); pretraining takes masked tasks "
                f"and pairs. Leave it out with --tasks.{name} null, or use skillnet finetune"
            )


def check_pretraining_splits(
    config: FinetuneConfig, corpora: "Mapping[str, PreparedCorpus]"
) -> None:
    """Raise UserError if a run reads a split that its corpus reserves, such as test.

    Args:
        config: the joint run.
        corpora: name -> prepared corpus; each manifest lists the splits for pretraining.
    """
    from pipelines.training.loading.task_columns import PRETRAINING, resolve_splits

    for name, settings in config.tasks.items():
        corpus = corpora[settings.corpus]
        allowed = resolve_splits(corpus, PRETRAINING)
        for split in resolve_splits(corpus, settings.split):
            if split not in allowed and not split.startswith(PAIRS_PREFIX):
                raise UserError(
                    f"tasks.{name}.split: the manifest of {corpus.name} allows "
                    f"{', '.join(allowed)} for pretraining, not {split}"
                )


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
