"""Bundle of a model: one directory with everything that predictions need, and its hashes.

    config.json, *.safetensors weights, as save_pretrained writes them
    tokenizer.json             of the corpora that the model was trained on
    captions-TASK.safetensors  embeddings of known captions, one row each
    captions-TASK.json         the captions
    inputs-TASK.safetensors    counts of the features of training rows, for inputs without a task
    manifest.json              hashes of all other files; its entry "serving" has names of classes
                               and symbols, limits, preprocessing settings, digests of the corpora

The registry stores bundles. A bundle opens without the corpora and without a network.
:func:`build_bundle` writes one, :func:`open_bundle` checks and opens one, and
:func:`open_predictor` opens any model.
"""

import csv
import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.tokenizer.guarded_loader import largest_token_id
from pipelines.data.transforms.text import is_unicode
from pipelines.serving.predictor import CaptionBank, TaskPredictor
from pipelines.training.evaluation.evaluator import locate_task_corpus
from pipelines.training.evaluation.inference import split_inputs
from pipelines.training.loading.task_columns import tower_column
from pipelines.training.runs.bundle_manifest import (
    BUNDLE_FORMAT,
    MANIFEST,
    REMEDY,
    TOKENIZER_FILE,
    add_bundle_manifest,
    read_bundle_manifest,
)
from pipelines.training.runs.model_source import ModelSource, load_trained_tasks
from pipelines.training.runs.vocabulary_match import check_corpus_vocabulary, read_corpus_names
from skillnet import systems
from skillnet.config import SkillNetConfig
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.precision import best_device
from skillnet.router import InputCounts, count_features, find_buckets, name_counts
from skillnet.serialization import (
    check_file,
    load_tensors,
    read_config,
    read_manifest,
    save_tensors,
    write_model,
)
from skillnet.skills import find_task
from skillnet_platform import __version__, console
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import (
    read_json,
    run_root,
    staging_directory,
    write_json,
)
from skillnet_platform.storage.location import (
    Location,
    join_location,
    parse_location,
    read_if_exists,
)

#: Increase it when the embeddings of known captions change: bundles of checkpoints are cached.
VECTORS_VERSION = 3
#: Maximum number of known captions of a task: embeddings of width 512 take 200 MB on disk and in
#: the memory of a predictor.
MAX_CAPTIONS = 100_000
#: Captions that are read or embedded in one batch.
BATCH_CAPTIONS = 8192
#: Deviation of a length from 1 that rounding can cause: bf16 has 8 bits.
TOLERANCE = 0.02
#: Rows of a task whose features are counted, those that calibrate the router, and of a batch.
COUNTED_ROWS, CALIBRATING_ROWS, COUNTED_BATCH = 2000, 100, 250
#: Vectors whose lengths are computed at once.
BLOCK_ROWS = 65_536
#: Evaluation rows in the folder of a run.
EVALUATION_CSV = "evaluation.csv"
#: Columns of evaluation rows that a bundle keeps.
FIGURE_COLUMNS = ("task", "split", "metric", "value", "low", "high")

Content = TypeVar("Content")


def build_bundle(
    source: ModelSource,
    data: str | Path,
    target: Path,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write a model's bundle atomically.

    Args:
        source: the trained model.
        data: directory of prepared corpora.
        target: directory to create.
        rows: evaluation rows of the model; None takes those of its run, if it has any.

    Returns:
        ``target``.

    Raises:
        UserError: a corpus of the model's tasks is missing or does not fit the model.
    """
    model = load_trained_tasks(source)
    corpora = {
        task: open_corpus(locate_task_corpus(data, task, source.corpora))
        for task in model.config.tasks
    }
    # A wrong corpus must fail before the captions are embedded.
    for task, corpus in corpora.items():
        check_corpus_vocabulary(model, task, corpus)
    tokenizer = read_tokenizer(corpora, parse_location(data, Path()))
    tasks = {
        task: {
            "corpus": corpus.name,
            "corpus_digest": corpus.digest,
            "licences": list_licences(corpus.source_names),
            "names": read_output_names(model, task, corpus),
            "limit": source.limits.get(task),
            "preprocessing": corpus.manifest.get("preprocessing", {}),
        }
        for task, corpus in corpora.items()
    }
    files = [TOKENIZER_FILE]
    with staging_directory(target) as folder:
        write_model(model, folder)
        # A copy, because the tokenizer beside the corpora may be replaced later (decision 24).
        (folder / TOKENIZER_FILE).write_bytes(tokenizer)
        predictor = TaskPredictor(model, tokenizers.load_tokenizer(folder / TOKENIZER_FILE), tasks)
        for task, corpus in corpora.items():
            # A task without a text tower cannot embed captions.
            if model.config.tasks[task].caption_tower is not None:
                captions, bank = read_known_captions(corpus), name_bank(task)
                # Embedded once here, so that a server does not run the text tower over all
                # captions.
                vectors = torch.from_numpy(embed_captions(predictor, task, captions))
                save_tensors({"embeddings": vectors}, folder / bank[1])
                write_json(folder / bank[0], captions)
                files += bank
            counts = count_inputs(model, task, corpus, source.limits.get(task))
            if counts is not None:
                counts.save(folder / name_counts(task))
                files.append(name_counts(task))
        about = {
            "package": __version__,
            "weights_digest": source.digest,
            "run_id": source.run_id,
            "steps": source.steps,
            "settings": source.settings,
            "evaluation": list_figures(source.run if rows is None else rows),
            "tasks": tasks,
        }
        # Last: the hashes cover every file.
        add_bundle_manifest(folder, about, files)
    return target


def open_bundle(folder: str | Path, precision: str = "auto") -> TaskPredictor:
    """Check the hash of every file of a bundle, and return its predictor.

    Args:
        folder: directory of the bundle.
        precision: see :class:`pipelines.training.evaluation.inference.InferenceRunner`.

    Raises:
        UserError: a file is missing or was altered.
        ValueError: the same, for a file of the model.
    """
    return _make_predictor(Path(folder), *_load_checked_bundle(Path(folder)), precision)


def _load_checked_bundle(folder: Path) -> tuple[dict[str, Any], TaskModel]:
    """Return the manifest and the model of a bundle; each file is hashed once, before its use."""
    manifest = read_bundle_manifest(folder)
    check_files(folder, manifest, manifest["files"])
    # Loading hashes the files that it reads: reading the weights twice would double the start.
    model = systems.load_model(folder)
    read = {"config.json", *(f"{file}.safetensors" for file in model.files_of())}
    weights = read_manifest(folder)
    check_files(folder, weights, weights["files"].keys() - read)
    return manifest, model.to(best_device())


def read_predictor(folder: Path, model: TaskModel) -> TaskPredictor:
    """Return the predictor of a model that was loaded from a bundle, for all or some tasks.

    Only the hashes of the files that the predictor reads are checked: those of the weights were
    checked when the model was loaded.

    Args:
        folder: directory of the bundle.
        model: from this folder.

    Raises:
        UserError: a file is missing or was altered.
    """
    manifest = read_bundle_manifest(folder)
    tasks = {name: each for name, each in manifest["tasks"].items() if name in model.config.tasks}
    check_files(folder, manifest, list_reading_files(tasks) & manifest["files"].keys())
    return _make_predictor(folder, manifest | {"tasks": tasks}, model, "auto")


def _make_predictor(
    folder: Path, manifest: dict[str, Any], model: TaskModel, precision: str
) -> TaskPredictor:
    check_tasks(folder / MANIFEST, manifest, model.config)
    files, tasks = manifest["files"], manifest["tasks"]
    banks = {
        task: _read_caption_bank(folder, task, model.config.embedding_dim)
        for task, spec in model.config.tasks.items()
        if find_objective(spec.objective).pairs_towers and name_bank(task)[0] in files
    }
    tokenizer = tokenizers.load_tokenizer(folder / TOKENIZER_FILE)
    _check_vocabulary(folder, manifest, tokenizer, model)
    counts = {task: folder / name_counts(task) for task in tasks if name_counts(task) in files}
    return TaskPredictor(model, tokenizer, tasks, banks, precision, counts)


def name_bank(task: str) -> tuple[str, str]:
    """Return the names of the files with the known captions of a task, and with their vectors."""
    return f"captions-{task}.json", f"captions-{task}.safetensors"


def list_reading_files(tasks: Iterable[str]) -> set[str]:
    """Return the possible names of files beside the weights that predictions of tasks read.

    Args:
        tasks: names of tasks.
    """
    return {TOKENIZER_FILE}.union(*((*name_bank(task), name_counts(task)) for task in tasks))


def check_bundle(folder: str | Path) -> dict[str, Any]:
    """Check the manifest of a bundle and the hash of every file, and return its ``serving``.

    Args:
        folder: directory of the bundle.

    Raises:
        UserError: a file is missing or was altered, or the bundle has another format.
    """
    folder = Path(folder)
    manifest = read_bundle_manifest(folder)
    for listed in (manifest, read_manifest(folder)):
        check_files(folder, listed, listed["files"])
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Compare files of a bundle with their sizes and hashes.

    Args:
        folder: directory of the bundle.
        manifest: document that lists them: of the weights, or its entry ``serving``.
        names: files to compare.

    Raises:
        UserError: a file is missing, a link, or was altered.
    """
    for name in sorted(names):
        try:
            check_file(folder, name, manifest)
        except ValueError as error:
            raise UserError(f"{error}; {REMEDY}") from None


def check_tasks(path: Path, manifest: Mapping[str, Any], config: SkillNetConfig) -> None:
    """Check that a bundle describes the tasks and outputs of its model.

    Args:
        path: location of the manifest.
        manifest: result of :func:`read_bundle_manifest`.
        config: settings of the model.

    Raises:
        UserError: a task is missing, or has another number of names than outputs.
    """
    if manifest["tasks"].keys() != config.tasks.keys():
        raise UserError(
            f"{path}: tasks are {', '.join(manifest['tasks'])}; the model has "
            f"{', '.join(config.tasks)}; {REMEDY}"
        )
    for task, spec in config.tasks.items():
        names = manifest["tasks"][task]["names"]
        if find_objective(spec.objective).listed and len(names) != spec.outputs:
            raise UserError(
                f"{path}: tasks.{task}.names has {len(names)} names; the model has {spec.outputs} "
                f"outputs; {REMEDY}"
            )


def _check_vocabulary(
    folder: Path, manifest: Mapping[str, Any], tokenizer: Any, model: TaskModel
) -> None:
    """Check that the tokenizer and the names of a bundle are those of its model.

    Raises:
        UserError: another tokenizer, a token beyond the vocabulary of the model, or other names.
    """
    path, size = folder / TOKENIZER_FILE, model.config.vocab_size
    largest = largest_token_id(tokenizer)
    if largest >= size:
        raise UserError(
            f"{path}: it has the token id {largest}; the model has {size} tokens; use "
            "the tokenizer of its training"
        )
    expected, found = model.vocabulary.tokenizer, manifest["files"][TOKENIZER_FILE]["sha256"]
    if expected is not None and found != expected:
        raise UserError(
            f"{path}: sha256 {found}; the model was trained with the tokenizer {expected}; {REMEDY}"
        )
    for task, names in model.vocabulary.outputs.items():
        if list(names) != manifest["tasks"][task]["names"]:
            raise UserError(
                f"{folder / MANIFEST}: tasks.{task}.names are not those of the model; {REMEDY}"
            )


def _read_caption_bank(folder: Path, task: str, width: int) -> CaptionBank:
    """Return the known captions of a task with their embeddings."""
    captions, path = (folder / name for name in name_bank(task))
    tensors, texts = load_tensors(path), read_json(captions)
    vectors = tensors.get("embeddings")
    # Vectors that are paired with other texts would give wrong captions without an error.
    valid = isinstance(texts, list) and all(
        isinstance(text, str) and is_unicode(text) for text in texts
    )
    if not valid or vectors is None:
        raise UserError(f"{path} does not contain an embedding for each text of {captions.name}")
    embeddings = vectors.float().numpy()
    check_unit_vectors(path, embeddings, (len(texts), width))
    return CaptionBank(texts, embeddings)


def open_predictor(
    source: ModelSource,
    data: str | Path | None,
    precision: str = "auto",
    task: str | None = None,
) -> TaskPredictor:
    """Return a predictor for any model; the bundle of a checkpoint is built once and cached.

    Args:
        source: the model.
        data: directory of prepared corpora; required for a checkpoint, which has no tokenizer.
        precision: see :class:`pipelines.training.evaluation.inference.InferenceRunner`.
        task: value of ``--task``, which the model must have.

    Raises:
        UserError: an unknown task; and as for :func:`build_bundle` and :func:`open_bundle`.
    """
    folder, (manifest, model) = _find_bundle(source, data, _load_checked_bundle)
    if task is not None:
        try:
            find_task(task, model.config.tasks)
        except ValueError as error:
            raise UserError(f"--task: {error}") from None
    return _make_predictor(folder, manifest, model, precision)


def find_bundle(source: ModelSource, data: str | Path | None) -> tuple[Path, dict[str, Any]]:
    """Return the checked bundle of any model and its manifest; see :func:`open_predictor`.

    Args:
        source: the model.
        data: directory of prepared corpora; required for a checkpoint.

    Raises:
        UserError: as for :func:`build_bundle` and :func:`open_bundle`.
    """
    return _find_bundle(source, data, check_bundle)


def _find_bundle(
    source: ModelSource, data: str | Path | None, read: Callable[[Path], Content]
) -> tuple[Path, Content]:
    """Return the bundle of any model, and what ``read`` returns for it."""
    if source.bundle is not None:
        return source.bundle, read(source.bundle)
    if data is None:
        raise UserError(f"{source.name} is a checkpoint; give --data with the prepared corpora")
    tasks = read_config(source.weights, read_manifest(source.weights))[0].tasks
    digests = [
        open_corpus(locate_task_corpus(data, task, source.corpora)).digest
        for task in source.trained_tasks(tasks)
        if task not in source.auxiliary
    ]
    # Another version of the package may preprocess differently, so it builds its own bundle.
    key = digest_config(
        [BUNDLE_FORMAT, VECTORS_VERSION, __version__, source.digest, digests, source.limits]
    )
    target = run_root() / "cache" / "bundles" / key[:16]
    # build_bundle publishes a complete directory or none, so this file proves completeness.
    if (target / MANIFEST).is_file():
        try:
            content = read(target)
        # A cache holds nothing of its own, so a damaged entry is built again.
        except (ValueError, OSError) as error:
            console.print_warning(f"damaged cache: {first_line(error)}; it is built again")
            shutil.rmtree(target)
        else:
            return target, content
    build_bundle(source, data, target)
    return target, read(target)


def count_inputs(
    model: TaskModel, task: str, corpus: PreparedCorpus, limit: int | None
) -> InputCounts | None:
    """Return the counts of the features of a task's rows; None for a task that needs none.

    Rows of the split ``train`` are counted. Those that calibrate come from the split
    ``validation``, or else from the end of ``train``, and are not counted.

    Args:
        model: its stems read media.
        task: name of the task.
        corpus: shards of the task.
        limit: maximum length of a row in tokens or frames.
    """
    spec = model.config.tasks[task]
    if not find_objective(spec.objective).has_labels or "train" not in corpus.splits:
        return None
    tower = spec.row_tower
    plan = spec.towers[tower]
    # Such a corpus cannot be searched either, which the search says.
    if corpus.modality != plan.modality:
        return None

    def read(split: str, numbers: np.ndarray) -> Iterator[np.ndarray]:
        table, where = corpus.splits[split].table(), f"{corpus.name}/{split}"
        column = tower_column(spec, tower)
        inputs = split_inputs(table, plan, model.config, where, column=column, limit=limit)
        for start in range(0, len(numbers), COUNTED_BATCH):
            batch = inputs.load_batch(numbers[start : start + COUNTED_BATCH])
            buckets = find_buckets(model, plan, batch)
            if buckets is not None:
                yield buckets

    counted = _spread(corpus.splits["train"].rows, COUNTED_ROWS)
    held = corpus.splits.get("validation")
    if held is not None and held.rows:
        kept = list(read("validation", _spread(held.rows, CALIBRATING_ROWS)))
    else:
        last = min(CALIBRATING_ROWS, len(counted) // 2)
        counted, numbers = counted[: len(counted) - last], counted[len(counted) - last :]
        kept = list(read("train", numbers))
    found = list(read("train", counted))
    return count_features(found, kept) if found else None


def _spread(rows: int, most: int) -> np.ndarray:
    """Return evenly spaced numbers of rows, as many as there are and at most ``most``."""
    return np.linspace(0, rows - 1, min(rows, most)).astype(np.int64)


def read_output_names(model: TaskModel, task: str, corpus: PreparedCorpus) -> list[str]:
    """Return the names of a task's classes, or of its symbols from 1; [] for retrieval.

    Args:
        model: its own names come first; a corpus may list the same in another order.
        task: name of the task.
        corpus: shards of the task.
    """
    spec = model.config.tasks[task]
    if find_objective(spec.objective).listed is None:
        return []
    names = model.vocabulary.outputs.get(task) or read_corpus_names(corpus, spec)
    # A corpus may have numbers only. Each output needs a name.
    return list(names or map(str, range(spec.outputs)))


def read_tokenizer(corpora: Mapping[str, PreparedCorpus], data: Location) -> bytes:
    """Read the tokenizer file of prepared corpora, and check it against their manifests.

    Args:
        corpora: task -> corpus.
        data: directory of prepared corpora.

    Returns:
        Content of the file.

    Raises:
        UserError: the file is missing, or the corpora were prepared with another tokenizer.
    """
    entries = {
        name: corpus.manifest["tokenizer"]
        for name, corpus in corpora.items()
        if corpus.manifest.get("tokenizer")
    }
    where = join_location(data, TOKENIZER_FILE)
    content = read_if_exists(where)
    if content is None and not entries:
        # No task reads text, so a tokenizer of single bytes is sufficient.
        return tokenizers.train_tokenizer([], []).encode()
    if content is None:
        raise UserError(f"{where} is missing; run `skillnet prepare`")
    # Ids of another tokenizer are valid numbers and would be read as other tokens.
    sha256 = hashlib.sha256(content).hexdigest()
    for task, entry in entries.items():
        if entry["sha256"] != sha256:
            raise UserError(
                f"{where} is not the tokenizer that {corpora[task].name} was prepared with; run "
                "`skillnet prepare`"
            )
    return content


def read_known_captions(corpus: PreparedCorpus, max_captions: int = MAX_CAPTIONS) -> list[str]:
    """Return the distinct first captions of all splits except ``pretrain``, in order.

    Shards are read one at a time, and none after the last returned caption.

    Args:
        corpus: shards of a retrieval task.
        max_captions: maximum number of captions.
    """
    # A dictionary removes duplicates and keeps the order, on which the digest of a bundle depends.
    captions: dict[str, None] = {}
    for name, split in corpus.splits.items():
        for shard in split.shards if name != "pretrain" else ():
            # The handle keeps the shard in the cache while it is read.
            opened = split.open_shard(shard)
            if "captions" not in opened.table.column_names:
                break  # rows without captions, for prediction only
            column = opened.table["captions"]
            for start in range(0, len(column), BATCH_CAPTIONS):
                rows = column.slice(start, BATCH_CAPTIONS).to_pylist()
                captions |= dict.fromkeys(row[0] for row in rows if row)
                if len(captions) > max_captions:
                    console.print_note(
                        f"{corpus.name} has more than {max_captions:,} captions; predictions "
                        "choose among the first ones only"
                    )
                    return list(captions)[:max_captions]
    return list(captions)


def embed_captions(predictor: TaskPredictor, task: str, captions: list[str]) -> np.ndarray:
    """Return the embeddings of captions, (N, E), computed in batches.

    Args:
        predictor: with the model and its tokenizer.
        task: a retrieval task.
        captions: N texts.
    """
    # Batches bound the memory of the tokenized texts.
    parts = [
        predictor.embed_texts(task, captions[start : start + BATCH_CAPTIONS])
        for start in range(0, len(captions), BATCH_CAPTIONS)
    ]
    return np.concatenate(parts) if parts else predictor.embed_texts(task, [])


def check_unit_vectors(path: Path, vectors: np.ndarray, shape: tuple[int, int]) -> None:
    """Check stored embeddings.

    Args:
        path: location of the file, for the message.
        vectors: its content.
        shape: expected number and width.

    Raises:
        UserError: another shape or type, or a vector whose length is neither 1 nor 0.
    """
    if vectors.shape != shape or vectors.dtype != np.float32:
        raise UserError(
            f"{path} is damaged: it holds {vectors.shape} numbers of type {vectors.dtype}, "
            f"expected {shape} of type float32"
        )
    for start in range(0, len(vectors), BLOCK_ROWS):
        lengths = np.linalg.norm(vectors[start : start + BLOCK_ROWS], axis=1)
        # A row without any real token has the vector zero. NaN fails both comparisons.
        is_unit = (np.abs(lengths - 1) <= TOLERANCE) | (lengths == 0)
        if not is_unit.all():
            row = start + int(np.argmin(is_unit))
            raise UserError(
                f"{path} is damaged: row {row} has the length {lengths[row - start]:.3g}, "
                "so its similarities would be no cosines"
            )


def list_licences(corpora: Iterable[str]) -> list[str]:
    """Return ``source: licence`` of the data of built-in corpora; [] for other corpora.

    Args:
        corpora: names of the corpora that rows come from.
    """
    from pipelines.data.corpora import find_corpus, is_built_in

    known = [name for name in corpora if is_built_in(name)]
    archives = [each for name in known for each in find_corpus(name).archives]
    # Two corpora may come from one archive.
    return list(dict.fromkeys(f"{each.requirement}: {each.licence}" for each in archives))


def list_figures(source: Path | Iterable[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return evaluation rows with the columns ``FIGURE_COLUMNS``, as plain values.

    Args:
        source: records of an evaluation, or the folder of a run; its figures are [] without them.
    """
    if isinstance(source, Path):
        source = _read_evaluation(source)
    figures = []
    for row in source or ():
        figure: dict[str, Any] = {key: str(row[key]) for key in FIGURE_COLUMNS[:3]}
        for key in FIGURE_COLUMNS[3:]:
            # An empty cell is a figure without an interval; JSON has no NaN.
            value = float(row[key]) if row.get(key) not in (None, "") else math.nan
            figure[key] = value if math.isfinite(value) else None
        figures.append(figure)
    return figures


def _read_evaluation(run: Path) -> list[dict[str, str]]:
    path = run / EVALUATION_CSV
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
