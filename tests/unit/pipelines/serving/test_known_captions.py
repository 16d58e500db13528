"""Known captions and searched rows have a limit, so memory does not grow with the corpus."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.shards.files import LocalShardStore
from pipelines.serving import bundle, corpus_search
from skillnet.skills import default_tasks, find_task
from skillnet_platform.errors import UserError
from tests.helpers.readable_corpora import write_corpora


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedCorpus:
    return open_corpus(write_corpora(tmp_path / "corpora") / "drawings")


def firsts(corpus: PreparedCorpus) -> list[str]:
    rows = [row for split in corpus.splits.values() for row in split.column("captions").to_pylist()]
    return list(dict.fromkeys(row[0] for row in rows))


def test_all_captions_are_known_below_the_limit(
    corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "BATCH_CAPTIONS", 3)
    assert bundle.read_known_captions(corpus) == firsts(corpus)


def test_no_shard_is_opened_after_the_last_returned_caption(
    corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = firsts(corpus)
    opened: list[str] = []
    before = LocalShardStore.open

    def recording_open(self: LocalShardStore, shard: dict[str, str]) -> object:
        opened.append(shard["file"])
        return before(self, shard)

    monkeypatch.setattr(LocalShardStore, "open", recording_open)
    assert bundle.read_known_captions(corpus, 2) == expected[:2]
    assert len(opened) == 1
    assert "choose among the first ones only" in capsys.readouterr().err


def test_captions_are_embedded_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "BATCH_CAPTIONS", 4)
    sizes: list[int] = []

    def embed_texts(task: str, texts: list[str]) -> np.ndarray:
        sizes.append(len(texts))
        return np.array([[float(text)] for text in texts])

    predictor = SimpleNamespace(embed_texts=embed_texts)
    vectors = bundle.embed_captions(predictor, "x", [str(n) for n in range(10)])  # type: ignore[arg-type]
    assert vectors[:, 0].tolist() == list(range(10))
    assert sizes == [4, 4, 2]


def test_a_search_above_the_memory_limit_names_a_split(
    corpus: PreparedCorpus, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sum(split.rows for split in corpus.splits.values())
    monkeypatch.setattr(corpus_search, "MAX_INDEX_BYTES", rows * 16 * 4 - 1)
    tasks = {"text_to_image": find_task("text_to_image", default_tasks())}
    predictor = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(embedding_dim=16, tasks=tasks)),
        runner=SimpleNamespace(precision=SimpleNamespace(name="fp32")),
        limits={},
    )
    source, splits = SimpleNamespace(digest="x"), list(corpus.splits)
    with pytest.raises(
        UserError, match=rf"vectors of {rows} rows take .*--splits (test|validation)"
    ):
        corpus_search.build_retrieval_index(predictor, source, "text_to_image", corpus, splits)  # type: ignore[arg-type]
