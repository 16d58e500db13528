"""TODO: pipelines.serving.retrieval_index."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from skillnet_platform import console
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, human_bytes, run_root

if TYPE_CHECKING:
    from pipelines.runs.model_source import ModelSource
    from pipelines.serving.predictor import TaskPredictor
    from pipelines.shards.dataset import PreparedCorpus

#: Goes up whenever the index changes, so that a kept one is not taken for a new one.
INDEX_VERSION = 1
#: Vectors of all rows that are searched are in memory.
MAX_INDEX_BYTES = 4 * 2**30


def build_retrieval_index(
    predictor: "TaskPredictor",
    source: "ModelSource",
    task: str,
    corpus: "PreparedCorpus",
    splits: Sequence[str],
) -> np.ndarray:
    """Vectors of all rows of some splits, (N, E); kept by the digests of model and corpus.

    Raises:
        UserError: they would not fit into ``MOST_BYTES``.
    """
    from safetensors.numpy import load_file, save

    from pipelines.evaluation.inference import split_inputs

    precision = predictor.runner.precision.name
    limit = predictor.limits.get(task)
    key = digest_config(
        [INDEX_VERSION, source.digest, corpus.digest, task, list(splits), precision, limit]
    )
    kept = run_root() / "cache" / "indexes" / f"{task}-{key[:16]}.safetensors"
    if kept.is_file():
        return load_file(kept)["embeddings"]
    config = predictor.model.config
    rows = sum(corpus.splits[name].rows for name in splits)
    if rows * config.embedding_dim * 4 > MAX_INDEX_BYTES:
        raise UserError(
            f"{corpus.name}: vectors of {rows:,} rows take "
            f"{human_bytes(rows * config.embedding_dim * 4)}, a search holds at most "
            f"{human_bytes(MAX_INDEX_BYTES)} in memory; name some of its splits, for example --splits "
            f"{min(splits, key=lambda name: corpus.splits[name].rows)}"
        )
    parts = []
    with console.progress(f"embedding {corpus.name}", None, "rows") as bar:
        for name in splits:
            inputs = split_inputs(
                corpus.splits[name].table(),
                config.tasks[task].towers["candidate"],
                config,
                f"{corpus.name}/{name}",
                limit=limit,
            )
            parts.append(predictor.runner.embed(task, "candidate", inputs))
            bar.advance(len(inputs), name)
    vectors = np.concatenate(parts)
    with atomic_write(kept) as stream:
        stream.write(save({"embeddings": vectors}))
    return vectors
