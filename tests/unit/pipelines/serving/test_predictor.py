"""A predictor preprocesses inputs with the settings of its corpora."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.base import SourceArchives
from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.transforms import video
from pipelines.serving import bundle
from pipelines.serving.inputs import PredictionItem, read_input_rows
from pipelines.serving.predictor import TaskPredictor
from pipelines.training.evaluation.inference import memory_inputs
from skillnet.model import SkillNet
from skillnet_corpora.demo.strokes import draw_pen_paths
from tests.helpers.readable_corpora import config
from tests.helpers.user_corpora import tnews
from tests.helpers.video_files import encode_video

WORDS = "新闻研究概论教程史料手册论文集年鉴方法的_abcdefghijklmnopqrstuvwxyz0123456789"


class RecordingPredictor(TaskPredictor):
    """Predictor that records the token ids of its last call."""

    def tokenize(self, texts: Any, limit: int) -> list[np.ndarray]:
        self.recorded = super().tokenize(texts, limit)
        return self.recorded


@pytest.fixture
def words(tmp_path: Path) -> Any:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizers.train_tokenizer([WORDS], [], size=400), encoding="utf-8")
    return tokenizers.load_tokenizer(path)


def predictor(
    words: Any, task: str, prepared: Mapping[str, Any], **limits: int
) -> RecordingPredictor:
    torch.manual_seed(0)
    classes = [f"class {number}" for number in range(15)]
    tasks = {
        name: {
            "names": classes if name == "text_classification" else [],
            "limit": limits.get(name),
            "preprocessing": prepared if name == task else {},
        }
        for name in config().tasks
    }
    return RecordingPredictor(SkillNet(config()), words, tasks)


@pytest.mark.parametrize("keywords", [False, True])
def test_headings_have_keywords_if_training_used_them(words, tmp_path, keywords):
    place = tnews(tmp_path / "tnews", other=3)
    corpus = open_external_corpus("tnews", str(place), {"keywords": keywords})
    rows = [row for row in corpus.rows(SourceArchives.none()) if isinstance(row, dict)]
    trained = [row["text"] for row in rows if row["split"] == "unlabelled"]
    tested = predictor(words, "text_classification", corpus.preprocessing())
    for row, text in zip(read_input_rows(place / "test.json", None), trained, strict=True):
        assert row.item is not None
        tested.predict([row.item])
        assert tested.recorded[0].tolist() == words.encode(text).ids[:48]


@pytest.mark.parametrize(
    ("prepared", "expected_tokens"),
    [({}, 20), ({"max_caption_tokens": 7}, 7), ({"caption_tokens": 64}, 24)],
)
def test_queries_are_truncated_like_captions(words, prepared, expected_tokens, monkeypatch):
    monkeypatch.setattr("pipelines.data.transforms.text.CAPTION_TOKENS", 20)
    tested = predictor(words, "text_to_image", prepared)
    tested.model.config.max_tokens = 24
    tested.embed_texts("text_to_image", [" " + "abc" * 40])
    assert len(tested.recorded[0]) == expected_tokens
    tested.predict([PredictionItem("x", "abc" * 40, None, "text_to_image")])
    assert len(tested.recorded[0]) == expected_tokens


def test_texts_and_code_are_truncated_like_the_corpus(words: Any) -> None:
    tested = predictor(words, "text_classification", {"max_tokens": 9})
    tested.predict([PredictionItem("x", "abc" * 40)])
    assert len(tested.recorded[0]) == 9
    tested = predictor(words, "text_to_code", {"code_tokens": 11}, text_to_code=10)
    source = b"def send(message):\n    return client.post(message, message, message)\n"
    tested.predict([PredictionItem("a.py", None, source)])
    assert len(tested.recorded[0]) == 10


@pytest.mark.parametrize("channels", [1, 3])
def test_videos_are_grey_or_coloured_like_the_corpus(words: Any, channels: int) -> None:
    white = draw_pen_paths([[(0.1, 0.5), (0.9, 0.5)]])
    data = encode_video(white // np.array([1, 2, 8], np.uint8))
    settings = {} if channels == 1 else {"video_channels": channels}
    tested = predictor(words, "text_to_video", settings)
    item = PredictionItem("clip.mp4", task="text_to_video", data=data)
    (found,) = tested.predict([item])
    frames = [video.load_video_frames(data, 8, 32, each) for each in (channels, 4 - channels)]
    plan = tested.model.config.tasks["text_to_video"].towers["candidate"]
    wanted, other = (
        tested.runner.embed("text_to_video", "candidate", memory_inputs([x], plan, config()))[0]
        for x in frames
    )
    assert found.embedding == pytest.approx(wanted.tolist(), abs=1e-5)
    assert found.embedding != pytest.approx(other.tolist(), abs=1e-2)


def test_corpora_without_text_need_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(bundle.read_tokenizer({}, tmp_path))
    assert tokenizers.load_tokenizer(tmp_path / "bytes.json").get_vocab_size() >= 4 + 256
