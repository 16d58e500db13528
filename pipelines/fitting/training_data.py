"""Prepared corpora of the tasks that Python trains: :class:`TrainingData`."""

import contextlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.data.corpora import open_external_corpus, parse_reader_prefix
from pipelines.data.preprocessing.prepare import list_rejections, prepare
from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.shards.format import MANIFEST
from pipelines.data.tokenizer.training import VOCABULARY_SIZE
from pipelines.fitting.tables import write_table
from pipelines.serving.bundle import build_bundle
from pipelines.training.config.run import FinetuneConfig, TaskTraining
from pipelines.training.loading.dataloader import Batch, prefetch_batches
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_model_tasks, resolve_run
from pipelines.training.loop.step import task_loss
from pipelines.training.runs.model_source import ModelSource
from pipelines.training.runs.vocabulary_match import read_corpora_vocabulary
from skillnet.config import SkillNetConfig
from skillnet.multitask_model import TaskModel
from skillnet.serialization import save_model
from skillnet.skills import find_task
from skillnet_platform import console
from skillnet_platform.config import parse_config, to_dict
from skillnet_platform.config.parser import list_options
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Keys of a run that the model and its data decide.
DECIDED = ("model.", "data", "system", "options", "from", "init_from", "corpora.")


@contextlib.contextmanager
def _messages_name_rows(scratch: Path) -> Iterator[None]:
    """Let errors and warnings of a block name the rows in memory, and options as Python's argument.

    Args:
        scratch: folder of the files that hold the rows, each with the name of its task.
    """
    file = re.compile(rf"{re.escape(str(scratch))}/([^/\s]+)\.(parquet|jsonl)")

    def name_rows(text: str) -> str:
        return file.sub(r"the rows of \1", text).replace("--options.", "options.")

    try:
        with console.changed_messages(name_rows):
            yield
    except UserError as error:
        raise UserError(name_rows(str(error))) from None


class TrainingData:
    """Data of some tasks, prepared as ``skillnet prepare`` does, on this machine alone.

    Args:
        sources: task -> its rows. A data frame, an Arrow table or a list of mappings, or split ->
            one of them, see :func:`pipelines.fitting.tables.write_table`; a path, with a format
            before it as after ``--corpus``; or the folder of a prepared corpus.
        folder: directory of the prepared corpora, which is created. Without it, they are deleted
            with this object.
        options: task -> options of its format, as after ``--options``, such as ``{"label":
            "category"}``.
        tokenizer: see ``skillnet prepare --tokenizer``; that of a model to continue with.
        vocabulary: number of tokens of a tokenizer that is trained.

    Raises:
        UserError: a source is missing, has no rows or has too many bad ones, or the labels are
            unknown; the message names the task.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        folder: str | Path | None = None,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        tokenizer: str | None = None,
        vocabulary: int = VOCABULARY_SIZE,
    ) -> None:
        if not sources:
            raise UserError('no data: give the rows of each task, such as {"topics": frame}')
        options = dict(options or {})
        if unknown := sorted(options.keys() - sources.keys()):
            raise UserError(f"options.{unknown[0]}: no such task; known: {', '.join(sources)}")
        ready = {
            task: Path(source).absolute()
            for task, source in sources.items()
            if isinstance(source, str | Path) and (Path(source) / MANIFEST).is_file()
        }
        self.folder = self._choose_folder(folder, ready)
        #: Task -> name of its corpus in :attr:`folder`.
        self.corpora = {task: path.name for task, path in ready.items()}
        raw = {task: source for task, source in sources.items() if task not in ready}
        with (
            tempfile.TemporaryDirectory(prefix="skillnet-rows-") as scratch,
            _messages_name_rows(Path(scratch)),
        ):
            external = []
            for task, source in raw.items():
                given = dict(options.get(task, {}))
                if isinstance(source, str | Path):
                    place = str(source)
                    place = place if parse_reader_prefix(place) else f"folder:{place}"
                else:
                    path, found = write_table(source, Path(scratch), task)
                    place, given = f"folder:{path}", found | given
                external.append(open_external_corpus(task, place, given))
                self.corpora[task] = task
            if external:
                prepared = prepare(
                    [],
                    self.folder,
                    self.folder,
                    external=external,
                    tokenizer=tokenizer,
                    vocabulary=vocabulary,
                    uses_ray=False,
                )
                list_rejections(prepared)

    def _choose_folder(self, folder: str | Path | None, ready: Mapping[str, Path]) -> Path:
        places = {path.parent for path in ready.values()}
        if folder is not None:
            places.add(Path(folder).absolute())
        if len(places) > 1:
            first, second = sorted(places)[:2]
            raise UserError(
                f"corpora in {first} and in {second}: prepare them in one folder, because one "
                "model has one tokenizer"
            )
        if places:
            return places.pop()
        made = Path(tempfile.mkdtemp(prefix="skillnet-data-"))
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return made

    @cached_property
    def prepared(self) -> dict[str, PreparedCorpus]:
        """Task -> its prepared corpus."""
        return {task: open_corpus(self.folder / name) for task, name in self.corpora.items()}

    def config(self, **sizes: Any) -> SkillNetConfig:
        """Return a model configuration with the tasks and the outputs of the data.

        Args:
            **sizes: arguments of :class:`skillnet.SkillNetConfig`; ``tasks`` gives a task another
                plan than that of its kind of data.

        Raises:
            UserError: a size is invalid.
        """
        tasks = {task: TaskTraining(name) for task, name in self.corpora.items()}
        try:
            model = SkillNetConfig(**sizes)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None
        manifests = {corpus.name: corpus.manifest for corpus in self.prepared.values()}
        return resolve_model_tasks(FinetuneConfig(model=model, tasks=tasks), manifests).model

    def resolve(
        self,
        model: TaskModel,
        settings: Mapping[str, Any] | None = None,
        run_dir: str | Path | None = None,
    ) -> ResolvedRun:
        """Return the run of a model on these data, as ``skillnet finetune`` resolves it.

        Args:
            model: has the tasks of the data and no others.
            settings: dotted key of ``skillnet finetune`` -> value, such as ``training.steps``.
            run_dir: directory of the run's folder; the run root by default.

        Raises:
            UserError: other tasks than those of the data, an unknown key or an invalid value.
        """
        settings = dict(settings or {})
        for key in settings:
            if key.startswith(DECIDED):
                raise UserError(f"{key}: the model and its data decide it; remove the key")
        if other := sorted(model.config.tasks.keys() ^ self.corpora.keys()):
            side = "data" if other[0] in model.config.tasks else "the model"
            raise UserError(
                f"the model has the tasks {', '.join(model.config.tasks)}, and the data "
                f"{', '.join(self.corpora)}: {side} lacks {other[0]}. Build the model with "
                "data.config(), or add a task to a trained model with `skillnet grow`"
            )
        corpora = {f"tasks.{task}.corpus": name for task, name in self.corpora.items()}
        words = list_options({"name": "fit", **corpora, **settings})
        try:
            config = parse_config(FinetuneConfig, words, "fit")
        except UserError as error:
            raise UserError(str(error).replace("command line: ", "settings: ", 1)) from None
        if config.training.workers > 1 or config.training.min_workers:
            raise UserError(
                f"training.workers is {config.training.workers}: this process trains alone. Use "
                "`skillnet finetune` for several workers"
            )
        config = replace(
            config,
            data=str(self.folder),
            run_dir=config.run_dir if run_dir is None else str(run_dir),
            system=model.system,
            options=dict(model.options),
            model=model.config,
        )
        return resolve_run(config, "fit")

    def batches(
        self, model: TaskModel, settings: Mapping[str, Any] | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of a training, in the order of ``fit``, for a loop of your own.

        A batch has ``task``, ``towers`` for ``model(batch.task, batch.towers)``, and ``targets``:
        ``labels`` (B,) and the like.

        Args:
            model: in training; it is given the vocabulary of the data.
            settings: see :meth:`resolve`; ``training.steps`` is the number of batches.
        """
        run = self.resolve(model, settings)
        self._set_vocabulary(model)
        device = next(model.parameters()).device
        with prefetch_batches(run.dataloader, 0, run.config.training.steps) as batches:
            for batch in batches:
                yield batch.to(device)

    def compute_loss(
        self, model: TaskModel, batch: Batch, outputs: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return the loss of the batch's objective, a mean over its rows, ().

        Args:
            model: in training.
            batch: one of :meth:`batches`.
            outputs: what the model returned for the batch; None computes them.
        """
        if outputs is None:
            outputs = model(batch.task, batch.towers)
        return task_loss(find_task(batch.task, model.config.tasks), outputs, batch)

    def finish(
        self,
        model: TaskModel,
        source: ModelSource | None = None,
        rows: "Sequence[Mapping[str, Any]] | None" = None,
    ) -> None:
        """Give a trained model what predictions need: tokenizer, names of outputs, and limits.

        Then it classifies, encodes and transcribes, and ``save_pretrained`` writes a folder that
        ``skillnet predict``, ``export``, ``serve`` and ``register`` take.

        Args:
            model: trained on these data; set to evaluation.
            source: folder of its run, with its settings; None for a loop of your own.
            rows: its evaluation; None takes those of its run.
        """
        self._set_vocabulary(model)
        model.eval()
        folder = Path(tempfile.mkdtemp(prefix="skillnet-model-"))
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        if source is None:
            save_model(model, folder / "weights")
            settings = to_dict(self.resolve(model).config)
            # Nothing is known about an own loop.
            settings.pop("training")
            source = ModelSource("fit", folder / "weights", settings=settings)
        model.origin = build_bundle(source, self.folder, folder / "bundle", rows or [])
        model._processor = None

    def _set_vocabulary(self, model: TaskModel) -> None:
        model.vocabulary = read_corpora_vocabulary(model.config.tasks, self.prepared)
