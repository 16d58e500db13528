"""The index of a search is verified when it is read; a damaged one is computed again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save, save_file

from pipelines.data.shards.dataset import open_corpus
from pipelines.serving import bundle
from pipelines.serving.corpus_search import build_retrieval_index, read_index, write_index
from pipelines.training.runs import model_source
from skillnet.model import SkillNet
from skillnet_platform.errors import UserError
from tests.helpers.readable_corpora import config, write_corpora


def unit_vectors(rows: int = 9, width: int = 4) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_index_is_read_as_written(tmp_path: Path) -> None:
    vectors = unit_vectors()
    vectors[2] = 0
    write_index(tmp_path / "x.safetensors", "key", vectors)
    assert np.array_equal(read_index(tmp_path / "x.safetensors", "key", (9, 4)), vectors)


def test_altered_index_is_rejected(tmp_path: Path) -> None:
    path, vectors = tmp_path / "x.safetensors", unit_vectors()
    write_index(path, "key", vectors)
    whole = path.read_bytes()

    def rejected(message: str, key: str = "key", shape: tuple[int, int] = (9, 4)) -> None:
        with pytest.raises(UserError, match=message) as caught:
            read_index(path, key, shape)
        assert str(path) in str(caught.value)

    rejected("of another model or corpus", key="other")
    rejected("is damaged: it holds", shape=(8, 4))
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    rejected("was altered")
    path.write_bytes(whole[:-5])
    rejected("is no index")
    path.write_bytes(b"")
    rejected("is no index")
    save_file({"embeddings": vectors}, path)
    rejected("of another model or corpus")
    path.write_bytes(save({"other": vectors}, metadata={"key": "key"}))
    rejected("is no index")
    # An author of the file can write a hash that fits.
    for value, message in ((5.18, r"row 0 has the length 5\.18"), (np.nan, "has the length nan")):
        changed = vectors.copy()
        changed[0] = changed[0] * np.float32(value)
        write_index(path, "key", changed)
        rejected(message)


def test_damaged_index_is_built_again(
    tmp_path: Path, run_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_corpora(tmp_path / "corpora")
    torch.manual_seed(0)
    SkillNet(config()).save_pretrained(tmp_path / "saved")
    source = model_source.resolve_model(str(tmp_path / "saved"))
    predictor, corpus = bundle.open_predictor(source, data), open_corpus(data / "drawings")

    def build() -> np.ndarray:
        return build_retrieval_index(predictor, source, "text_to_image", corpus, ["test"])

    vectors = build()
    (path,) = (run_root / "cache" / "indexes").iterdir()
    changed = load_file(path)["embeddings"]
    changed[0] *= 5.18
    save_file({"embeddings": changed}, path)
    capsys.readouterr()
    assert np.array_equal(build(), vectors)
    reported = " ".join(capsys.readouterr().err.split())
    assert "damaged cache" in reported
    assert reported.count("it is built again") == 1
    assert np.array_equal(build(), vectors)
    assert "damaged" not in capsys.readouterr().err
