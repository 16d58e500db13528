"""Bundle of a model: one directory with everything that predictions need, and its hashes.

    config.json, manifest.json, *.safetensors
                               weights, as save_pretrained writes them
    tokenizer.json             of the corpora that the model was trained on
    captions-TASK.safetensors  embeddings of known captions, one row each
    captions-TASK.json         the captions
    serving.json               names of classes and symbols, limits, preprocessing settings,
                               digests of the corpora, hashes of all other files

The registry stores bundles. A bundle opens without the corpora and without a network.
:func:`build_bundle` writes one, :func:`open_bundle` checks and opens one, and
:func:`open_predictor` opens any model.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.transforms.text import is_unicode
from pipelines.serving.bundle_checks import (
    MODEL_MANIFEST,
    check_bundle_vocabulary,
    check_recorded_hashes,
    check_tasks,
)
from pipelines.serving.bundle_facts import list_licences, read_run_figures, select_figures
from pipelines.serving.known_captions import embed_captions, read_known_captions
from pipelines.serving.predictor import CaptionBank, TaskPredictor
from pipelines.serving.unit_vectors import check_unit_vectors
from pipelines.training.evaluation.evaluator import locate_task_corpus
from pipelines.training.runs.bundle_manifest import (
    BUNDLE_FORMAT,
    BUNDLE_MANIFEST,
    compute_bundle_digest,
    read_bundle_manifest,
)
from pipelines.training.runs.model_source import ModelSource, load_trained_tasks
from pipelines.training.runs.vocabulary_match import (
    TOKENIZER_FILE,
    check_corpus_vocabulary,
    read_corpus_names,
)
from skillnet import systems
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.precision import best_device
from skillnet.serialization import (
    check_inside,
    load_tensors,
    read_config,
    read_manifest,
    save_tensors,
    write_model,
)
from skillnet_platform import __version__, console
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import (
    read_json,
    run_root,
    sha256_file,
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
VECTORS_VERSION = 2

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
    specs = model.config.tasks
    # A wrong corpus must fail before the captions are embedded.
    for task, corpus in corpora.items():
        check_corpus_vocabulary(model, task, corpus)
    tokenizer = read_tokenizer(corpora, parse_location(data, Path()))
    names = {task: read_output_names(model, task, corpus) for task, corpus in corpora.items()}
    with staging_directory(target) as folder:
        write_model(model, folder)
        # A copy, because the tokenizer beside the corpora may be replaced later (decision 24).
        (folder / TOKENIZER_FILE).write_bytes(tokenizer)
        preprocessing = {task: c.manifest.get("preprocessing", {}) for task, c in corpora.items()}
        predictor = TaskPredictor(
            model,
            tokenizers.load_tokenizer(folder / TOKENIZER_FILE),
            names,
            limits=source.limits,
            preprocessing=preprocessing,
        )
        for task, corpus in corpora.items():
            # A task without a text tower cannot embed captions.
            if specs[task].caption_tower is not None:
                captions = read_known_captions(corpus)
                # Embedded once here, so that a server does not run the text tower over all
                # captions.
                vectors = embed_captions(predictor, task, captions)
                save_tensors(
                    {"embeddings": torch.from_numpy(vectors)},
                    folder / f"captions-{task}.safetensors",
                )
                write_json(folder / f"captions-{task}.json", captions)
        # Listed after everything is written, so that the hashes cover every file.
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        manifest = {
            "format": BUNDLE_FORMAT,
            "package": __version__,
            "weights_digest": source.digest,
            "run_id": source.run_id,
            "steps": source.steps,
            "settings": source.settings,
            "evaluation": select_figures(read_run_figures(source.run) if rows is None else rows),
            "tasks": {
                task: {
                    "corpus": corpus.name,
                    "corpus_digest": corpus.digest,
                    "licences": list_licences(corpus.source_names),
                    "names": names[task],
                    "limit": source.limits.get(task),
                    "preprocessing": preprocessing[task],
                }
                for task, corpus in corpora.items()
            },
            "files": {str(path.relative_to(folder)): sha256_file(path) for path in files},
        }
        manifest["digest"] = compute_bundle_digest(manifest)
        write_json(folder / BUNDLE_MANIFEST, manifest)
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
    manifest = _read_required_manifest(folder)
    files = manifest["files"].keys()
    _check_hashes(folder, manifest, [MODEL_MANIFEST])
    weights = check_recorded_hashes(folder, manifest)
    _check_hashes(folder, manifest, files - weights - {MODEL_MANIFEST})
    # Loading hashes the files that it reads: reading the weights twice would double the start.
    model = systems.load_model(folder)
    read = {"config.json", *(f"{file}.safetensors" for file in model.files_of())}
    _check_hashes(folder, manifest, weights - read)
    return manifest, model.to(best_device())


def read_predictor(folder: Path, model: TaskModel) -> TaskPredictor:
    """Return the predictor of a model that was loaded from a bundle, for all or some tasks.

    Only the hashes of the files that the predictor reads are checked: those of the weights were
    checked when the model was loaded.

    Args:
        folder: directory of the bundle.
        model: from this folder.

    Raises:
        UserError: a file is missing or was altered, or the manifests record other hashes.
    """
    manifest = _read_required_manifest(folder)
    tasks = {name: each for name, each in manifest["tasks"].items() if name in model.config.tasks}
    banks = [f"captions-{task}.{kind}" for task in tasks for kind in ("json", "safetensors")]
    wanted = {TOKENIZER_FILE, MODEL_MANIFEST, *banks}
    _check_hashes(folder, manifest, wanted & manifest["files"].keys())
    check_recorded_hashes(folder, manifest)
    return _make_predictor(folder, manifest | {"tasks": tasks}, model, "auto")


def _make_predictor(
    folder: Path, manifest: dict[str, Any], model: TaskModel, precision: str
) -> TaskPredictor:
    check_tasks(folder / BUNDLE_MANIFEST, manifest, model.config)
    banks = {}
    for task, spec in model.config.tasks.items():
        has_captions = find_objective(spec.objective).pairs_towers
        if has_captions and f"captions-{task}.json" in manifest["files"]:
            banks[task] = _read_caption_bank(folder, task, model.config.embedding_dim)
    tokenizer = tokenizers.load_tokenizer(folder / TOKENIZER_FILE)
    check_bundle_vocabulary(folder, manifest, tokenizer, model)
    return TaskPredictor(
        model,
        tokenizer,
        {task: entry["names"] for task, entry in manifest["tasks"].items()},
        banks,
        {task: entry["limit"] for task, entry in manifest["tasks"].items()},
        precision,
        {task: entry["preprocessing"] for task, entry in manifest["tasks"].items()},
    )


def check_bundle(folder: str | Path) -> dict[str, Any]:
    """Check ``serving.json`` and the hash of every file, and return the content of the former.

    Args:
        folder: directory of the bundle.

    Raises:
        UserError: a file is missing or was altered, or the bundle has another format.
    """
    folder = Path(folder)
    manifest = _read_required_manifest(folder)
    _check_hashes(folder, manifest, manifest["files"])
    check_recorded_hashes(folder, manifest)
    return manifest


def _read_required_manifest(folder: Path) -> dict[str, Any]:
    path = folder / BUNDLE_MANIFEST
    manifest = read_bundle_manifest(path)
    # A manifest without files would otherwise pass, because it has nothing to compare.
    missing = {TOKENIZER_FILE, MODEL_MANIFEST} - manifest["files"].keys()
    if missing:
        raise UserError(f"{path} does not list {', '.join(sorted(missing))}")
    return manifest


def _check_hashes(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    path = folder / BUNDLE_MANIFEST
    for name in sorted(names):
        # A bundle may come from elsewhere; a name like ../x must not reach other files.
        check_inside(path, name, deep=True)
        # The target of a link may change after its hash was checked.
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name} is a link; a bundle must contain the file itself")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; register the model again")
        if sha256_file(folder / name) != manifest["files"][name]:
            raise UserError(f"{folder / name} was altered after the model was registered")


def _read_caption_bank(folder: Path, task: str, width: int) -> CaptionBank:
    """Return the known captions of a task with their embeddings."""
    path, captions = folder / f"captions-{task}.safetensors", folder / f"captions-{task}.json"
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
    source: ModelSource, data: str | Path | None, precision: str = "auto"
) -> TaskPredictor:
    """Return a predictor for any model; the bundle of a checkpoint is built once and cached.

    Args:
        source: the model.
        data: directory of prepared corpora; required for a checkpoint, which has no tokenizer.
        precision: see :class:`pipelines.training.evaluation.inference.InferenceRunner`.

    Raises:
        UserError: as for :func:`build_bundle` and :func:`open_bundle`.
    """
    folder, (manifest, model) = _find_bundle(source, data, _load_checked_bundle)
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
    if (target / BUNDLE_MANIFEST).is_file():
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
