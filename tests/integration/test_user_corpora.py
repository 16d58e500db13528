"""The paper's corpora from disk, end to end: prepared together, one model trained, evaluated."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import evaluate, finetune, inspect, predict, prepare
from pipelines.data.corpora import open_external_corpus
from pipelines.data.preprocessing import prepare as preparation
from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from skillnet_corpora.paper import LABELS
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora
from tests.helpers.prepared_corpora import prepare_in_process

pytestmark = pytest.mark.integration
NAMES = ("tnews", "aishell1", "aic_icc", "vatex", "pytorrent")
TASK = {
    "tnews": "text_classification",
    "aishell1": "speech_recognition",
    "aic_icc": "text_to_image",
    "vatex": "text_to_video",
    "pytorrent": "text_to_code",
}


class Place:
    """The corpora as the user has them, and prepared."""

    def __init__(self, root: Path) -> None:
        self.given = root / "given"
        for name in NAMES:
            getattr(user_corpora, name)(self.given / name)
        damaged = self.given / "vatex" / "more"
        first = min(damaged.glob("-*.mp4"))
        first.write_bytes(first.read_bytes()[:2000])
        self.data = root / "corpora"
        self.words = [f"--corpus={name}={self.given / name}" for name in NAMES]
        self.words += ["--data", str(self.data), "--vocabulary", "900", "--max_error_rate", "0.3"]

    def open(self, name: str) -> PreparedCorpus:
        """A prepared corpus, every shard hashed."""
        return open_corpus(self.data / name, verify=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The corpora; all tests here prepare in this process."""
    made = Place(tmp_path_factory.mktemp("user"))
    with pytest.MonkeyPatch.context() as patch:
        prepare_in_process(patch)
        assert prepare.main(made.words) == 0
        yield made


def test_splits_and_rejected_rows(place: Place) -> None:
    splits = {name: {s: p.rows for s, p in place.open(name).splits.items()} for name in NAMES}
    assert splits["aishell1"] == {"test": 4, "train": 15, "validation": 4}
    assert splits["aic_icc"] == {"test": 5, "test_b": 5, "train": 11, "validation": 5}
    assert splits["pytorrent"] == {"test": 5, "train": 12, "validation": 5}
    assert splits["tnews"]["unlabelled"] == 15
    assert place.open("aic_icc").manifest["quarantine"] == {
        "an image without captions": 1,
        "captions without an image": 1,
    }
    lines = (place.data / "vatex" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    reported = [json.loads(line) for line in lines]
    (damaged,) = [row for row in reported if row["key"] == "-a_00-xxxxx_000000_000010"]
    assert (damaged["file"], damaged["row"]) == ("vatex_training_v1.0.json", 1)
    assert damaged["media"].endswith("more/-a_00-xxxxx_000000_000010.mp4")
    assert damaged["reason"] == "no video in the file"
    assert all("file" in row for row in reported)


def test_rows_are_what_the_tasks_read(place: Place) -> None:
    for name in NAMES:
        assert place.open(name).task == TASK[name]
    aishell = place.open("aishell1")
    symbols = aishell.manifest["symbols"]
    for row in aishell.splits["test"].table().to_pylist():
        decoded = "".join(symbols[number - 1] for number in row["symbols"])
        assert decoded.replace("<unk>", "?") == "".join(
            c if c in symbols else "?" for c in row["text"]
        )
        assert row["frames"] == len(row["log_mel"]) > 50
    for row in place.open("aic_icc").splits["train"].table().to_pylist():
        assert len(row["captions"]) == len(row["caption_tokens"]) == 5
    clip = np.array(place.open("vatex").splits["train"].column("frames")[0].as_py(), np.uint8)
    ink = clip.reshape(8, -1).astype(int).sum(1)
    assert (np.diff(ink) >= 0).all()  # a character is being written: frames in order
    assert ink[-1] > 2 * ink[0]  # and spread over the clip
    functions = place.open("pytorrent").splits["train"].table().to_pylist()
    assert all('"""' not in row["code"] and "def " in row["code"] for row in functions)


def test_a_second_run_does_nothing_and_new_options_do(place: Place) -> None:
    again = {p: p.stat().st_mtime_ns for p in place.data.glob("*/*.arrow")}
    assert prepare.main(place.words) == 0
    assert again == {p: p.stat().st_mtime_ns for p in place.data.glob("*/*.arrow")}
    before = place.open("tnews").digest
    words = [f"--corpus=tnews={place.given / 'tnews'}", "--data", str(place.data)]
    assert prepare.main([*words, "--options.tnews.max_tokens", "4"]) == 0
    assert place.open("tnews").digest != before
    assert max(map(len, place.open("tnews").splits["train"].column("tokens").to_pylist())) == 4
    assert prepare.main(words) == 0
    assert place.open("tnews").digest == before


def test_one_model_learns_all_five(place: Place, run_root: Path) -> None:
    tasks = {task: {"batch_size": 4} for task in TASK.values()}
    config = {
        "model": {
            **{"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16, "embedding_dim": 8},
            **{"vocab_size": 900, "tubelet": [4, 16, 16]},
            **{"image_size": 48, "video_frames": 8, "video_size": 32},
        },
        "training": {"steps": 6, "log_every": 1},
        "tasks": tasks,
    }
    (run_root / "c.yaml").write_text(json.dumps(config), encoding="utf-8")
    words = ["--config", "paper", "--config", str(run_root / "c.yaml"), "--name", "five"]
    words += ["--data", str(place.data)]
    short = [*words, "--model.max_frames", "60", "--name", "short"]
    assert finetune.main(short) == 2  # a transcript asks for its whole recording
    assert finetune.main(words) == 0
    output = run_root / "figures.csv"
    words = ["--model", "five", "--data", str(place.data), "--bootstrap_samples", "20"]
    assert evaluate.main([*words, "--simple_baselines", "false", "--output", str(output)]) == 0
    figures = output.read_text(encoding="utf-8")
    for task in TASK.values():
        assert task in figures
    test, reported = place.given / "tnews" / "test.json", run_root / "tnews_predict.json"
    words = ["--model", "five", "--data", str(place.data), "--task", "text_classification"]
    words += ["--input", str(test), "--output", str(reported), "--format", "clue"]
    assert predict.main(words) == 0
    lines = [json.loads(line) for line in reported.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == list(range(15))
    assert all(LABELS[line["label"]] == line["label_desc"] for line in lines)


def test_too_many_missing_clips_stop_with_a_summary(place: Place, tmp_path: Path) -> None:
    folder = user_corpora.vatex(tmp_path / "vatex")
    for clip in list(folder.rglob("*.mp4"))[::2]:
        clip.unlink()
    corpus = open_external_corpus("vatex", str(folder))
    with pytest.raises(UserError, match=r"vatex: \d+ of \d+ rows.*captions without a video"):
        preparation.prepare([], tmp_path / "data", tmp_path, external=[corpus])
    assert not (tmp_path / "data" / "vatex").exists()


def test_a_tokenizer_of_ones_own(place: Place, tmp_path: Path, capsys: Any) -> None:
    from tests.unit.pipelines.data.tokenizer.test_tokenizer_conversion import word_piece

    word_piece().save(str(tmp_path / "tokenizer.json"))
    words = [f"--corpus=tnews={place.given / 'tnews'}", "--tokenizer", str(tmp_path)]
    assert prepare.main([*words, "--data", str(tmp_path / "data")]) == 0
    tokens = open_corpus(tmp_path / "data" / "tnews").splits["train"].column("tokens").to_pylist()
    assert 1 not in {number for row in tokens for number in row}
    # Other corpora use another tokenizer: refused, and nothing is changed.
    before = (place.data / "tokenizer.json").read_bytes()
    capsys.readouterr()
    assert prepare.main([*words, "--data", str(place.data)]) == 2
    assert "aic_icc" in capsys.readouterr().err
    assert (place.data / "tokenizer.json").read_bytes() == before


def test_a_description_in_plain_values(place: Place, capsys: Any) -> None:
    capsys.readouterr()
    assert inspect.main([str(place.given / "vatex"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["reader"], found["modality"], found["complete"]) == ("vatex", "video", True)
    assert found["rows"] == 27
    assert found["rejected"] == {"a video without captions": 9, "captions without a video": 1}
    assert found["media"]["frames"] == "12"
    assert len(found["media"]["rejected"]) == 1
    assert found["example"]["captions"][0].startswith("写")
    assert not list(place.given.parent.glob("given/*/*.arrow"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere", "/nowhere: no such file or folder"),
        ("{empty}", "an empty folder"),
    ],
)
def test_inspecting_a_wrong_path_exits_with_two(
    tmp_path: Path, capsys: Any, path: str, message: str
) -> None:
    capsys.readouterr()
    assert inspect.main([path.format(empty=tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "tnews"], "expected NAME=VALUE"),
        (["--corpus", "tnews=/nowhere"], "/nowhere: no such file or folder"),
        (["--corpus", "tnesw=/"], "did you mean 'tnews'"),
        (["tnews"], "give --corpus tnews=PATH"),
        (["--options.tnews.max_tokens", "3"], "no such corpus is given with --corpus"),
        (["--corpus", "tnews={tnews}", "--tokenizer", "/nowhere"], "no tokenizer there"),
        (["--corpus", "tnews={tnews}", "--options.tnews.max_tokns", "3"], "did you mean 'max_tok"),
    ],
)
def test_mistakes_exit_with_two(
    place: Place, tmp_path: Path, capsys: Any, words: list[str], message: str
) -> None:
    given = {"empty": tmp_path, "tnews": place.given / "tnews"}
    capsys.readouterr()
    said = [word.format(**given) for word in words]
    assert prepare.main([*said, "--data", str(tmp_path / "data")]) == 2
    assert message in capsys.readouterr().err
