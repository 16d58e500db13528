"""Retrieval index of a prepared corpus: embeddings of its rows or captions, cached on disk.

``skillnet search`` calls :func:`build_retrieval_index`. A file holds the vectors, their hash and
the key of what they were computed from. A file that fails a check is damaged and built again.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.serving.unit_vectors import check_unit_vectors
from skillnet.rust_panics import panics_as_errors
from skillnet_platform import console
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import atomic_write, human_bytes, run_root

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus
    from pipelines.serving.predictor import TaskPredictor
    from pipelines.training.runs.model_source import ModelSource

#: Increase it when the index changes, so that cached files are not reused.
INDEX_VERSION = 3
#: A search holds the embeddings of all searched rows in memory.
MAX_INDEX_BYTES = 4 * 2**30


def build_retrieval_index(
    predictor: "TaskPredictor",
    source: "ModelSource",
    task: str,
    corpus: "PreparedCorpus",
    splits: Sequence[str],
    tower: str | None = None,
    place: str = "",
) -> np.ndarray:
    """Return the embeddings of all rows of some splits; the file is cached by model and corpus.

    Args:
        predictor: with the model.
        source: run, version or folder of the model; its digest is part of the cache key.
        task: a retrieval task.
        corpus: to embed.
        splits: names of its splits.
        tower: that embeds the rows; the tower of captions embeds the first caption of each row.
            None takes the tower of the rows.
        place: position of this index among others, for progress.

    Returns:
        Unit vectors (N, E) float32, in the order of the splits and their rows.

    Raises:
        UserError: the splits have no rows, the corpus is of another modality, or the embeddings
            exceed ``MAX_INDEX_BYTES``.
    """
    from pipelines.training.evaluation.inference import split_inputs
    from pipelines.training.loading.task_columns import is_row_tower, tower_column

    # bf16 and float32 give different vectors, so an index belongs to one precision.
    precision = predictor.runner.precision.name
    limit = predictor.limits.get(task)
    spec = predictor.model.config.tasks[task]
    tower = tower or spec.row_tower
    about = [INDEX_VERSION, source.digest, corpus.digest, task, tower, list(splits), precision]
    key = digest_config([*about, limit])
    path = run_root() / "cache" / "indexes" / f"{task}-{key[:16]}.safetensors"
    config = predictor.model.config
    modality = spec.towers[spec.row_tower].modality
    # Both audio and video have a column ``frames``, so a wrong corpus would fail in the stem.
    if corpus.modality != modality:
        raise UserError(
            f"{task}: the task ranks {modality}, but the corpus {corpus.name} holds "
            f"{corpus.modality}. Use a model that was trained on this corpus"
        )
    rows = sum(corpus.splits[name].rows for name in splits)
    if not rows:
        raise UserError(
            f"{corpus.name}: no rows in {', '.join(splits) or 'any split but pretrain'}. Name "
            f"other splits with --splits; the corpus has {', '.join(corpus.splits) or 'none'}"
        )
    if path.is_file():
        try:
            return read_index(path, key, (rows, config.embedding_dim))
        # A cache holds nothing of its own, so a damaged file is built again.
        except (ValueError, OSError) as error:
            console.print_warning(f"damaged cache: {first_line(error)}; it is built again")
    size = rows * config.embedding_dim * 4  # float32
    # Checked in advance: embedding takes long, and memory would run out only at its end.
    if size > MAX_INDEX_BYTES:
        raise UserError(
            f"{corpus.name}: vectors of {rows:,} rows take "
            f"{human_bytes(size)}, a search holds at most {human_bytes(MAX_INDEX_BYTES)} in "
            "memory; name some of its splits, for example --splits "
            # The smallest split is the one that fits most probably.
            f"{min(splits, key=lambda name: corpus.splits[name].rows)}"
        )
    parts = []
    with console.show_progress(f"embedding {corpus.name}{place}", rows, "rows") as bar:
        for name in splits:
            inputs = split_inputs(
                corpus.splits[name].table(),
                spec.towers[tower],
                config,
                f"{corpus.name}/{name}",
                column=tower_column(spec, tower),
                # The limit is about the corpus' own modality.
                limit=limit if is_row_tower(spec, tower) else None,
            )
            bar.advance(0, name)
            parts.append(predictor.runner.embed(task, tower, inputs, bar.advance))
    vectors = np.concatenate(parts)
    write_index(path, key, vectors)
    return vectors


def write_index(path: Path, key: str, vectors: np.ndarray) -> None:
    """Write embeddings with their hash.

    Args:
        path: file to write.
        key: digest of all that decides the embeddings.
        vectors: unit vectors (N, E) float32.
    """
    from safetensors.numpy import save

    about = {"key": key, "sha256": _hash_vectors(vectors)}
    # Two searches may build one index; no reader must see half a file.
    with atomic_write(path) as stream:
        stream.write(save({"embeddings": vectors}, metadata=about))


def read_index(path: Path, key: str, shape: tuple[int, int]) -> np.ndarray:
    """Read embeddings, and check their hash, key, shape and lengths.

    Args:
        path: file to read.
        key: digest of all that decides the embeddings.
        shape: expected number and width.

    Raises:
        UserError: the file is damaged, or of another model or corpus.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with panics_as_errors("no safetensors file"), safe_open(path, "numpy") as tensors:
            about = tensors.metadata() or {}
            vectors = np.asarray(tensors.get_tensor("embeddings"))
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no index ({error})") from None
    if about.get("key") != key:
        raise UserError(f"{path} is the index of another model or corpus")
    if about.get("sha256") != _hash_vectors(vectors):
        raise UserError(f"{path} was altered: it does not fit its hash")
    check_unit_vectors(path, vectors, shape)
    return vectors


def _hash_vectors(vectors: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vectors).data).hexdigest()
