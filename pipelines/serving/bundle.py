"""A bundle: all that predictions need, in one folder, and the hashes to check it by.

    model/                     weights, as save_pretrained writes them
    tokenizer.json             of the corpora that the model was trained on
    captions-TASK.safetensors  vectors of known captions, one row each
    captions-TASK.json         those captions
    serving.json               names of classes and symbols, limits, how inputs were prepared,
                               digests of the corpora, hashes of all other files

This is what the registry keeps of a model. It opens without the corpora and without a network.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pipelines.evaluation.evaluator import check_outputs, locate_task_corpus
from pipelines.runs.head_sizes import LISTED
from pipelines.runs.model_source import ModelSource
from pipelines.runs.model_source import load_trained_tasks as load_model
from pipelines.serving.predictor import CaptionBank, TaskPredictor
from pipelines.shards.dataset import PreparedCorpus, open_corpus
from pipelines.tokenizer import training as tokenizers
from skillnet import systems
from skillnet.precision import best_device
from skillnet.serialization import check_inside, load_tensors, read_config, read_manifest
from skillnet.skills import Task
from skillnet_platform import __version__, console
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError
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

BUNDLE_FORMAT = 1
#: Count it up when the vectors of known captions change; bundles made for a checkpoint are kept.
VECTORS_VERSION = 2
#: Known captions of a task, at most: with vectors of 512 numbers they take 200 MB in the bundle and
#: in the memory of whoever predicts.
MAX_CAPTIONS = 100_000
#: Captions that are read or embedded at once.
BATCH_CAPTIONS = 8192
BUNDLE_MANIFEST = "serving.json"
TOKENIZER_FILE = "tokenizer.json"


def build_bundle(source: ModelSource, data: str | Path, target: Path) -> Path:
    """Write a model's bundle, whole or not at all; returns its folder.

    Raises:
        UserError: the corpora of the model's tasks are missing or do not fit it.
    """
    model = load_model(source)
    corpora = {
        task: open_corpus(locate_task_corpus(data, task, source.corpora))
        for task in model.config.tasks
    }
    words = read_tokenizer(corpora, parse_location(data, Path()))
    specs = model.config.tasks
    for task, corpus in corpora.items():
        check_outputs(corpus, task, specs[task])
    names = {task: read_output_names(corpus, specs[task]) for task, corpus in corpora.items()}
    with staging_directory(target) as folder:
        model.save_pretrained(folder / "model")
        (folder / TOKENIZER_FILE).write_bytes(words)
        prepared = {task: c.manifest.get("preprocessing", {}) for task, c in corpora.items()}
        predictor = TaskPredictor(
            model,
            tokenizers.load_tokenizer(folder / TOKENIZER_FILE),
            names,
            limits=source.limits,
            prepared=prepared,
        )
        for task, corpus in corpora.items():
            if specs[task].objective == "retrieval":
                captions = read_known_captions(corpus)
                vectors = embed_captions(predictor, task, captions)
                save_file({"embeddings": vectors}, folder / f"captions-{task}.safetensors")
                write_json(folder / f"captions-{task}.json", captions)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        about = {
            "format": BUNDLE_FORMAT,
            "package": __version__,
            "weights_digest": source.digest,
            "run_id": source.run_id,
            "steps": source.steps,
            "settings": source.settings,
            "tasks": {
                task: {
                    "corpus": corpus.name,
                    "corpus_digest": corpus.digest,
                    "names": names[task],
                    "limit": source.limits.get(task),
                    "preprocessing": prepared[task],
                }
                for task, corpus in corpora.items()
            },
            "files": {str(path.relative_to(folder)): sha256_file(path) for path in files},
        }
        write_json(folder / BUNDLE_MANIFEST, about)
    return target


def open_bundle(folder: str | Path, precision: str = "auto") -> TaskPredictor:
    """A predictor from a bundle. Every file is hashed first.

    Raises:
        UserError: a file is missing or was altered; names it.
    """
    folder = Path(folder)
    about = check_bundle(folder)
    model = systems.load_model(folder / "model").to(best_device())
    banks = {}
    for task, spec in model.config.tasks.items():
        if spec.objective == "retrieval" and f"captions-{task}.json" in about["files"]:
            banks[task] = _bank(folder, task)
    return TaskPredictor(
        model,
        tokenizers.load_tokenizer(folder / TOKENIZER_FILE),
        {task: entry["names"] for task, entry in about["tasks"].items()},
        banks,
        {task: entry["limit"] for task, entry in about["tasks"].items()},
        precision,
        {task: entry["preprocessing"] for task, entry in about["tasks"].items()},
    )


def check_bundle(folder: str | Path) -> dict[str, Any]:
    """Hash every file of a bundle; returns what ``serving.json`` says.

    Raises:
        UserError: a file is missing or was altered, or the bundle is of another format.
    """
    folder = Path(folder)
    about = read_json(folder / BUNDLE_MANIFEST)
    told = about if isinstance(about, dict) else {}
    if told.get("format") != BUNDLE_FORMAT:
        raise UserError(
            f"{folder / BUNDLE_MANIFEST}: format {told.get('format')!r}, this program reads {BUNDLE_FORMAT}; "
            f"it was written by skillnet-platform {told.get('package')}"
        )
    tasks, files = about.get("tasks"), about.get("files")
    entries = tasks.values() if isinstance(tasks, dict) else [None]
    whole = all(isinstance(each, dict) and {"names", "limit"} <= set(each) for each in entries)
    if not whole or not isinstance(files, dict):
        raise UserError(
            f"{folder / BUNDLE_MANIFEST}: tasks or files are damaged; register the model again"
        )
    needed = {TOKENIZER_FILE, "model/manifest.json"}
    if needed - set(files):
        raise UserError(
            f"{folder / BUNDLE_MANIFEST} does not list {', '.join(sorted(needed - set(files)))}"
        )
    for name, expected in files.items():
        check_inside(folder / BUNDLE_MANIFEST, name, deep=True)
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name} is a link; a bundle holds its files itself")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; register the model again")
        if sha256_file(folder / name) != expected:
            raise UserError(f"{folder / name} was altered after the model was registered")
    return about


def _bank(folder: Path, task: str) -> CaptionBank:
    """The known captions of a task, with their vectors."""
    path, captions = folder / f"captions-{task}.safetensors", folder / f"captions-{task}.json"
    tensors, words = load_tensors(path), read_json(captions)
    vectors = tensors.get("embeddings")
    texts = isinstance(words, list) and all(isinstance(each, str) for each in words)
    if not texts or vectors is None or vectors.ndim != 2 or len(vectors) != len(words):
        raise UserError(f"{path} does not hold a vector for each text of {captions.name}")
    return CaptionBank(words, vectors.numpy())


def open_predictor(
    source: ModelSource, data: str | Path | None, precision: str = "auto"
) -> TaskPredictor:
    """A predictor for any model: from its bundle, or from one made now and kept for next time.

    Args:
        source: the model.
        data: prepared corpora; needed for a checkpoint, which has no tokenizer of its own.
        precision: see :class:`pipelines.evaluation.inference.InferenceRunner`.

    Raises:
        UserError: as :func:`build_bundle` and :func:`open_bundle`.
    """
    if source.bundle is not None:
        return open_bundle(source.bundle, precision)
    if data is None:
        raise UserError(f"{source.name} is a checkpoint: give --data, the prepared corpora")
    tasks = read_config(source.weights, read_manifest(source.weights))[0].tasks
    digests = [
        open_corpus(locate_task_corpus(data, task, source.corpora)).digest
        for task in tasks
        if task not in source.auxiliary
    ]
    key = digest_config(
        [BUNDLE_FORMAT, VECTORS_VERSION, __version__, source.digest, digests, source.limits]
    )
    kept = run_root() / "cache" / "bundles" / key[:16]
    if not (kept / BUNDLE_MANIFEST).is_file():
        build_bundle(source, data, kept)
    return open_bundle(kept, precision)


def read_output_names(corpus: PreparedCorpus, spec: Task) -> list[str]:
    """Names of a task's classes, or of its symbols from 1 on; [] for retrieval."""
    key = LISTED.get(spec.objective)
    return list(corpus.manifest.get(key, [])) if key else []


def read_known_captions(corpus: PreparedCorpus, most: int = MAX_CAPTIONS) -> list[str]:
    """The distinct first captions of all splits but pretraining, in order, up to so many.

    Shards are read one by one, and none beyond the last caption that is taken.
    """
    found: dict[str, None] = {}
    for name, split in corpus.splits.items():
        for shard in split.shards if name != "pretrain" else ():
            opened = split.files.open(shard)  # held while it is read: a cache may want its place
            if "captions" not in opened.table.column_names:
                break  # rows for prediction only
            captions = opened.table["captions"]
            for start in range(0, len(captions), BATCH_CAPTIONS):
                rows = captions.slice(start, BATCH_CAPTIONS).to_pylist()
                found |= dict.fromkeys(row[0] for row in rows if row)
                if len(found) > most:
                    console.note(
                        f"{corpus.name} has more than {most:,} captions: answers are chosen among "
                        "the first ones"
                    )
                    return list(found)[:most]
    return list(found)


def embed_captions(predictor: TaskPredictor, task: str, captions: list[str]) -> np.ndarray:
    """Vectors of known captions, (N, E): spelt in tokens a batch at a time."""
    parts = [
        predictor.embed_texts(task, captions[start : start + BATCH_CAPTIONS])
        for start in range(0, len(captions), BATCH_CAPTIONS)
    ]
    return np.concatenate(parts) if parts else predictor.embed_texts(task, [])


def read_tokenizer(corpora: Mapping[str, PreparedCorpus], data: Location) -> bytes:
    """The tokenizer file of some corpora, checked against their manifests.

    Raises:
        UserError: it is missing or another one than the corpora were prepared with.
    """
    entries = {
        name: corpus.manifest["tokenizer"]
        for name, corpus in corpora.items()
        if corpus.manifest.get("tokenizer")
    }
    where = join_location(data, TOKENIZER_FILE)
    found = read_if_exists(where)
    if found is None and not entries:
        return tokenizers.train_tokenizer(
            [], []
        ).encode()  # nothing reads text: one of bytes alone will do
    if found is None:
        raise UserError(f"{where} is missing; run `skillnet prepare`")
    sha256 = hashlib.sha256(found).hexdigest()
    for task, entry in entries.items():
        if entry["sha256"] != sha256:
            raise UserError(
                f"{where} is not the tokenizer that {corpora[task].name} was prepared with; run "
                "`skillnet prepare`"
            )
    return found
