"""``skillnet predict`` and ``skillnet search`` from a registered model, without its corpora."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import predict, search
from pipelines.data.transforms import video
from pipelines.serving.bundle import open_predictor
from pipelines.serving.inputs import PredictionItem, guess_modality
from pipelines.training.runs import model_source
from skillnet.model import SkillNet
from skillnet_platform.errors import UserError
from tests.helpers.readable_corpora import STROKES, SUBJECTS, config
from tests.helpers.registered_model import Place, registered
from tests.helpers.sound_files import encode_tone
from tests.helpers.video_files import encode_video

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield from registered(tmp_path_factory)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each kind."""
    folder = tmp_path_factory.mktemp("files")
    picture = np.full((60, 80, 3), 255, np.uint8)
    picture[20:40, 30:50] = (220, 40, 50)
    Image.fromarray(picture).save(folder / "square.png")
    clip = video.draw_pen_paths([STROKES["横"], STROKES["竖"]])
    (folder / "clip.mp4").write_bytes(encode_video(clip))
    (folder / "tone.mp3").write_bytes(encode_tone())
    (folder / "module.py").write_text(
        'def read_file(file):\n    """读取文件"""\n    return client.read(file)\n\n\n'
        "class Sender:\n    def send(self, message):\n        return self.post(message)\n",
        encoding="utf-8",
    )
    return folder


def run(words: list[str], capsys: pytest.CaptureFixture[str], command=predict) -> list | dict:
    capsys.readouterr()
    assert command.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def no_corpora(place: Place):
    """The corpora are moved away: a registered model must not miss them."""
    away = place.data.with_name("away")
    place.data.rename(away)
    yield
    away.rename(place.data)


@pytest.mark.usefixtures("no_corpora")
class TestPredict:
    def test_every_kind_of_input_finds_its_task(self, place: Place, files: Path, capsys):
        names = ["square.png", "tone.mp3", "clip.mp4", "module.py"]
        files = [str(files / name) for name in names]
        answers = run(["--text", "历史研究", *files, "--top", "3"], capsys)
        assert [a["task"] for a in answers] == [
            "text_classification",
            "text_to_image",
            "speech_recognition",
            "text_to_video",
            "text_to_code",
            "text_to_code",
        ]
        text, picture, sound, clip, *functions = answers
        assert text["answer"] in SUBJECTS
        assert len(text["alternatives"]) == 3
        assert 0 < text["score"] < 1
        assert "的" in picture["answer"]
        assert all(part in {f"p{i}" for i in range(1, 62)} for part in sound["answer"].split())
        assert set(clip["answer"].split("、")) <= set(STROKES)
        assert [f["input"].rpartition(":")[2] for f in functions] == [
            "1 read_file",
            "7 Sender.send",
        ]
        for answer in (picture, clip, *functions):
            assert len(answer["embedding"]) == config().embedding_dim
            assert np.linalg.norm(answer["embedding"]) == pytest.approx(1, abs=1e-3)

    def test_rows_of_a_file(self, place: Place, files: Path, capsys, tmp_path: Path):
        rows = files / "rows.jsonl"
        rows.write_text(
            '{"text": "数学教程"}\n\n{"file": "square.png"}\n'
            '{"text": "红色", "task": "text_to_image"}\n',
            encoding="utf-8",
        )
        out = tmp_path / "predictions.jsonl"
        answers = run([str(rows), "--output", str(out)], capsys)
        assert [a["task"] for a in answers] == ["text_classification"] + ["text_to_image"] * 2
        assert answers[2]["answer"] == ""
        assert answers[2]["score"] is None
        assert len(answers[2]["embedding"]) == config().embedding_dim
        lines = out.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == answers

    def test_rows_that_cannot_be_used_are_reported_and_the_rest_arrives(
        self, place: Place, files: Path, capsys
    ):
        (files / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
        rows = files / "mixed.jsonl"
        given = [{"text": "数学教程"}, {"text": " "}, {"file": "torn.png"}, {"text": "法律概论"}]
        rows.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
        capsys.readouterr()
        assert predict.main([str(rows), "--json"]) == 0
        said = capsys.readouterr()
        assert [a["input"] for a in json.loads(said.out)] == ["数学教程", "法律概论"]
        reported = " ".join(said.err.split())
        assert f"{rows}, line 2: the text is empty; row skipped" in reported
        assert f"{rows}, line 3: a damaged image" in reported

    def test_an_empty_sentence_has_a_prediction(self, place: Place):
        made = open_predictor(model_source.resolve_model("models:/skillnet@champion"), place.data)
        item = PredictionItem("", "", task="text_classification", may_be_empty=True)
        assert made.predict([item])[0].answer in SUBJECTS

    def test_a_table_for_people(self, place: Place, files: Path, capsys):
        words = ["--text", "经济手册", str(files / "square.png")]
        assert predict.main(words) == 0
        printed = capsys.readouterr().out
        assert "text_classification" in printed
        assert "经济手册" in printed

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "no input; give --text"),
            (["{files}/none.png"], "no such file"),
            (["{files}/broken.png"], "broken.png: a damaged image"),
            (["{files}/broken.mp3"], "broken.mp3: not audio"),
            (["{files}/empty.py"], "the file is empty"),
            (["{files}/unknown.xyz"], "unknown file type"),
            (["{files}/bad.jsonl"], "bad.jsonl, line 1: not JSON"),
            (["{files}/square.png", "--task", "speech_recognition"], "reads sound, this is image"),
            (["--text", "x", "--task", "text_to_imag"], "did you mean 'text_to_image'"),
            (["--text", "   "], "the text is empty"),
            (["--text", "x", "--model", "models:/skillnet@champoin"], "aliases @champion"),
            (["--text", "x", "--top", "0"], "top: expected a whole number from 1 to"),
        ],
    )
    def test_mistakes_have_one_message(self, place: Place, files: Path, capsys, words, message):
        (files / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
        (files / "broken.mp3").write_bytes(b"nonsense" * 400)
        (files / "empty.py").write_bytes(b"")
        (files / "unknown.xyz").write_bytes(b"nonsense")
        (files / "bad.jsonl").write_text('{"text": \n')
        capsys.readouterr()
        assert predict.main([word.format(files=files) for word in words]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(errors) == 1
        assert message in errors[0]


def test_a_checkpoint_gives_the_same_and_needs_the_corpora(
    place: Place, files: Path, capsys, tmp_path
):
    words = ["--text", "法律概论", str(files / "clip.mp4")]
    registered = run(words, capsys)
    assert run([*words, "--model", str(place.saved)], capsys) == registered
    assert predict.main([*words, "--model", str(place.saved), "--data", str(tmp_path)]) == 2
    assert "skillnet prepare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "data", "modality"),
    [
        ("a.PNG", b"", "image"),
        ("upload", b"\x89PNG\r\n\x1a\n", "image"),
        ("upload", b"RIFF\0\0\0\0WAVEfmt ", "sound"),
        ("upload", b"RIFF\0\0\0\0WEBPVP8 ", "image"),
        ("upload", b"\0\0\0\x20ftypisom", "video"),
        ("upload", b"ID3\x04", "sound"),
    ],
)
def test_what_a_file_is(name, data, modality):
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

    def test_scores_are_those_of_the_model(self, place: Place, capsys):
        found = run(["蓝色的圆圈", "--top", "3", "--precision", "fp32"], capsys, search)
        from pipelines.data.shards.dataset import open_corpus
        from pipelines.data.tokenizer import training as tokenizer_training

        model = SkillNet.from_pretrained(place.saved)
        words = tokenizer_training.load_tokenizer(place.data / "tokenizer.json")
        corpus = open_corpus(place.data / "drawings")
        with torch.no_grad():
            tokens = torch.tensor([words.encode("蓝色的圆圈").ids])
            query = model.embed("text_to_image", "query", {"tokens": tokens})[0]
            for hit in found["hits"]:
                row = corpus.splits[hit["split"]].table().slice(hit["row"], 1).to_pylist()[0]
                assert row["key"] == hit["key"]
                assert row["captions"][0] == hit["caption"]
                pixels = torch.tensor(row["pixels"], dtype=torch.uint8).view(1, 48, 48, 3)
                vector = model.embed("text_to_image", "candidate", {"pixels": pixels})[0]
                assert float(query @ vector) == pytest.approx(hit["score"], abs=1e-5)

    @pytest.mark.parametrize(
        ("task", "searched", "shown"),
        [("text_to_video", 64, "<img src="), ("text_to_code", 25, "<pre")],
    )
    def test_other_tasks(self, place: Place, capsys, task, searched, shown):
        found = run(["读取文件", "--task", task, "--top", "4"], capsys, search)
        assert found["searched"] == searched
        assert Path(found["page"]).read_text(encoding="utf-8").count(shown) == 4

    def test_the_index_is_kept_until_model_or_corpus_change(self, place: Place, capsys, tmp_path):
        indexes = Path(search.run_root()) / "cache" / "indexes"
        words = ["黑色", "--top", "1", "--splits", "validation"]
        run(words, capsys, search)
        before = {path: path.stat().st_mtime_ns for path in indexes.iterdir()}
        run(words, capsys, search)
        assert {path: path.stat().st_mtime_ns for path in indexes.iterdir()} == before
        torch.manual_seed(1)
        SkillNet(config()).save_pretrained(tmp_path / "other")
        run([*words, "--model", str(tmp_path / "other")], capsys, search)
        assert len(list(indexes.iterdir())) == len(before) + 1

    def test_the_users_text_cannot_break_the_page(self, place: Place, capsys):
        found = run(['<script>alert("x")</script>红'], capsys, search)
        assert "<script" not in Path(found["page"]).read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "the query is empty"),
            ([" "], "the query is empty"),
            (["心", "--task", "text_classification"], "is not a retrieval task"),
            (["心", "--splits", "tset"], "has no split 'tset'"),
            (["心", "--data", "/nowhere"], "missing. Run `skillnet prepare drawings`"),
        ],
    )
    def test_mistakes_have_one_message(self, place: Place, capsys, words, message):
        capsys.readouterr()
        assert search.main(words) == 2
        assert message in capsys.readouterr().err


def test_a_damaged_bundle_in_the_cache_is_built_again(place: Place, capsys):
    words = ["--text", "农业", "--model", str(place.saved)]
    expected = run(words, capsys)
    cache = Path(search.run_root()) / "cache" / "bundles"
    for bundle in cache.iterdir():
        (bundle / "tokenizer.json").write_text("{}")
    assert predict.main([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == expected
    assert "damaged cache" in said.err
    shutil.rmtree(cache)


def test_user_errors_are_user_errors():
    with pytest.raises(UserError):
        guess_modality("x", b"")
