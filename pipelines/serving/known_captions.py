"""Known captions of a retrieval task: the answers to images, videos and functions.

:func:`pipelines.serving.bundle.build_bundle` reads and embeds them once.
"""

import numpy as np

from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.serving.predictor import TaskPredictor
from skillnet_platform import console

#: Maximum number of known captions of a task: embeddings of width 512 take 200 MB on disk and in
#: the memory of a predictor.
MAX_CAPTIONS = 100_000
#: Captions that are read or embedded in one batch.
BATCH_CAPTIONS = 8192


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
