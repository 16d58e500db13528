"""``skillnet predict`` and ``skillnet search`` from a registered model, without its corpora."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import predict
from pipelines.serving.bundle import open_predictor
from pipelines.serving.inputs import PredictionItem, guess_modality
from pipelines.training.runs import model_source
from skillnet.model import SkillNet
from skillnet_platform.errors import UserError
from skillnet_serving import search
from tests.helpers.readable_corpora import SUBJECTS, config
from tests.helpers.registered_model import Place, registered

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield from registered(tmp_path_factory)


def run(words: list[str], capsys: pytest.CaptureFixture[str], command=predict) -> list | dict:
    capsys.readouterr()
    assert command.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_registered_model_needs_no_corpora_and_a_checkpoint_does(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What each kind of input gets is in tests/unit/pipelines/serving/test_entries.py."""
    (tmp_path / "a.py").write_text("def read_file(file):\n    return client.read(file)\n")
    words = ["--text", "法律概论", str(tmp_path / "a.py"), "--top", "3"]
    away = place.data.rename(place.data.with_name("away"))
    try:
        lean = run(words, capsys)
        words += ["--embeddings", "true"]
        registered = run(words, capsys)
        assert predict.main(words) == 0
        assert "text_classification" in capsys.readouterr().out
    finally:
        away.rename(place.data)
    assert [each["task"] for each in registered] == ["text_classification", "text_to_code"]
    assert registered[0]["answer"] in SUBJECTS
    assert lean[1] == {name: registered[1][name] for name in lean[1]}
    assert registered[1].keys() - lean[1].keys() == {"embedding"}
    assert np.linalg.norm(registered[1]["embedding"]) == pytest.approx(1, abs=1e-3)
    assert run([*words, "--model", str(place.saved)], capsys) == registered
    assert predict.main([*words, "--model", str(place.saved), "--data", str(tmp_path)]) == 2
    assert "skillnet prepare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "x", "--model", "models:/skillnet@champoin"], "aliases @champion"),
        (["--text", "x", "--top", "0"], "top: expected a whole number from 1 to"),
    ],
)
def test_mistakes_of_a_prediction_have_one_message(
    place: Place, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert predict.main(words) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert message in error


def test_an_empty_sentence_has_a_prediction(place: Place) -> None:
    made = open_predictor(model_source.resolve_model("models:/skillnet@champion"), place.data)
    item = PredictionItem("", "", task="text_classification", may_be_empty=True)
    assert made.predict([item])[0].answer in SUBJECTS


@pytest.mark.parametrize(
    ("name", "data", "modality"),
    [
        ("a.PNG", b"", "image"),
        ("upload", b"\x89PNG\r\n\x1a\n", "image"),
        ("upload", b"RIFF\0\0\0\0WAVEfmt ", "sound"),
        ("upload", b"RIFF\0\0\0\0WEBPVP8 ", "image"),
        ("upload", b"\0\0\0\x20ftypisom", "video"),
        ("upload", b"ID3\x04", "sound"),
        ("x", b"", None),
    ],
)
def test_what_a_file_is(name, data, modality):
    with contextlib.nullcontext() if modality else pytest.raises(UserError, match="unknown file"):
        assert guess_modality(name, data) == modality


class TestSearch:
    def test_ranks_every_row_by_similarity(self, place: Place, capsys, tmp_path: Path):
        page = tmp_path / "page.html"
        found = run(["红色的", "方块", "--html", str(page), "--top", "50"], capsys, search)
        assert found["query"] == "红色的 方块"
        assert found["searched"] == 48
        assert len(found["hits"]) == 48
        scores = [hit["score"] for hit in found["hits"]]
        assert scores == sorted(scores, reverse=True)
        assert [hit["rank"] for hit in found["hits"]] == list(range(1, 49))
        assert len({hit["key"] for hit in found["hits"]}) == 48
        html = page.read_text(encoding="utf-8")
        assert html.count("<img src=") == 48
        assert "红色的 方块" in html

    def test_a_query_is_shown_as_text_and_a_page_is_written_through_a_link(
        self, place: Place, capsys, tmp_path: Path
    ):
        page = tmp_path / "link.html"
        page.symlink_to("page.html")
        assert search.main(["[/b]\x1b]52;c;x\x07", "--html", str(page), "--top", "1"]) == 0
        shown = capsys.readouterr()
        assert "[/b]\\u001b]52;c;x\\u0007" in shown.out
        assert "\x1b" not in shown.out + shown.err
        assert page.is_symlink()
        assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")

    def test_the_index_is_kept_until_model_or_corpus_change(self, place: Place, capsys, tmp_path):
        indexes = Path(search.run_root()) / "cache" / "indexes"
        words = ["黑色", "--top", "1", "--splits", "validation"]
        run(words, capsys, search)

        def list_indexes() -> dict[Path, int]:
            return {path: path.stat().st_mtime_ns for path in indexes.glob("*.safetensors")}

        before = list_indexes()
        run(words, capsys, search)
        assert list_indexes() == before
        torch.manual_seed(1)
        SkillNet(config()).save_pretrained(tmp_path / "other")
        run([*words, "--model", str(tmp_path / "other")], capsys, search)
        assert len(list_indexes()) == len(before) + 1
