"""Bundles: wrong values have a message, damaged caches are built again, requests are parallel."""

import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from pipelines import predict
from pipelines.data.shards.dataset import CorpusSplit, open_corpus
from pipelines.serving import bundle
from pipelines.serving.inputs import PredictionItem
from pipelines.serving.predictor import AnswerLayout, TaskPrediction
from pipelines.training.runs import model_source
from pipelines.training.runs.bundle_manifest import read_bundle_manifest, write_sealed
from skillnet import SkillNet
from skillnet.router import InputCounts, name_counts
from skillnet.serialization import describe_files, read_manifest
from skillnet_platform.errors import UserError
from tests.helpers.served_place import ServedPlace


def copy_bundle(place: ServedPlace, tmp_path: Path) -> Path:
    return shutil.copytree(place.bundle, tmp_path / "copy")


def seal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Change the entry of a bundle; write hashes and a digest that fit, as an attacker would."""
    manifest = read_manifest(folder)
    listed = manifest["serving"]["files"]
    listed |= describe_files(folder, listed)
    change(manifest["serving"])
    write_sealed(folder, manifest)


TASK = "text_classification"
#: Marks an entry that is taken out.
GONE = object()
PREPARED = f"tasks.{TASK}.preprocessing"
#: Key of the entry ``serving`` -> its new value, and the message.
CHANGES: list[tuple[str, Any, str]] = [
    (f"tasks.{TASK}.names", GONE, r"tasks\.text_class.*\.names is miss"),
    (f"tasks.{TASK}.names", "ab", r"\.names is 'ab'; it should"),
    (f"tasks.{TASK}.names", [7] * 15, r"\.names\.0 is 7"),
    (f"tasks.{TASK}.names", ["a"] * 14, "has 14 names; the model has 15"),
    (f"tasks.{TASK}.names", ["\ud83d"] * 15, r"\.names\.0 is '.ud83d"),
    ("tasks.x", "copy", "tasks are .*, x; the"),
    (f"tasks.{TASK}", GONE, "the model has .*text_classification"),
    (f"tasks.{TASK}", [], "is .*; it should"),
    (f"tasks.{TASK}.limit", "9", r"\.limit is '9'; it should"),
    (f"tasks.{TASK}.limit", 0, r"\.limit is 0; it sho"),
    (f"tasks.{TASK}.limit", True, r"\.limit is True"),
    (PREPARED, 3, "preprocessing is 3"),
    (f"{PREPARED}.max_tokens", "x", r"preprocessing\.max_tokens is 'x'"),
    (f"{PREPARED}.max_seconds", 1e308, r"preprocessing\.max_seconds is 1e\+308"),
    (f"{PREPARED}.fit", [], r"fit is \[\]; it should be 'pad' or"),
    (f"{PREPARED}.video_channels", True, "video_channels is True; it should be a valid integer"),
    ("steps", "many", "steps is 'many'"),
    ("run_id", 3, "run_id is 3; it should be a valid string"),
    ("settings", [1], r"settings is \[1\]; it should be a val"),
    ("files.manifest|json", 3, "json is 3; it should"),
    ("code", "import os", "code is no known key"),
    ("format", 99, "format 99, this program reads 4"),
]


def set_entry(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = (part.replace("|", ".") for part in key.split("."))
    parent = tree
    for part in path:
        parent = parent[part]
    if value is GONE:
        del parent[last]
    else:
        parent[last] = parent[TASK] if value == "copy" else value


@pytest.mark.parametrize(("key", "value", "message"), CHANGES)
def test_wrong_value_of_the_manifest_is_named(place, tmp_path, key, value, message):
    folder = copy_bundle(place, tmp_path)
    seal(folder, lambda serving: set_entry(serving, key, value))
    with pytest.raises(UserError, match=message) as caught:
        bundle.open_bundle(folder)
    assert str(caught.value).startswith(str(folder / "manifest.json"))


def test_change_of_the_manifest_that_fits_its_schema_is_noticed(place, tmp_path):
    folder = copy_bundle(place, tmp_path)
    whole = read_manifest(folder)
    names = whole["serving"]["tasks"][TASK]["names"]
    names[0], names[1] = names[1], names[0]
    weights = read_manifest(folder)
    weights["files"]["shared.safetensors"]["sha256"] = "0" * 64
    for changed in (whole, weights):
        (folder / "manifest.json").write_text(json.dumps(changed), encoding="utf-8")
        for read in (read_bundle_manifest, lambda path: model_source.resolve_model(str(path))):
            with pytest.raises(UserError, match="was altered: it does not fit its digest"):
                read(folder)


def test_tokenizer_with_tokens_beyond_the_vocabulary_is_rejected(place, tmp_path):
    folder = copy_bundle(place, tmp_path)
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tree["model"]["vocab"]["zzz"] = 1200
    (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    seal(folder)
    with pytest.raises(UserError, match="has the token id 1200; the model has 1200 tokens"):
        bundle.open_bundle(folder)


def test_a_router_counts_training_rows_and_calibrates_with_others(place, monkeypatch):
    monkeypatch.setattr(bundle, "CALIBRATING_ROWS", 7)
    model = SkillNet.from_pretrained(place.bundle)
    corpus = open_corpus(place.data / "headings")

    def count(**splits: CorpusSplit) -> InputCounts:
        found = bundle.count_inputs(
            model, "text_classification", replace(corpus, splits=splits), None
        )
        assert found is not None
        return found

    train, validation, test = (corpus.splits[n] for n in ("train", "validation", "test"))
    usual = count(train=train, validation=validation, test=test)
    assert len(usual.rows) == 7
    # Test rows have no influence, and without a validation split the last training rows calibrate.
    assert_array_equal(count(train=train, validation=validation).rows, usual.rows)
    without = count(train=train, test=test)
    assert len(without.rows) == 7
    kept = np.bincount(without.rows[without.rows >= 0], minlength=len(usual.counts))
    assert_array_equal(without.counts + kept, usual.counts)
    assert bundle.count_inputs(model, "text_classification", replace(corpus, splits={}), 9) is None
    (place.bundle / name_counts("text_classification")).stat()


def test_captions_that_are_no_unit_vectors_are_rejected(place: ServedPlace, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = copy_bundle(place, tmp_path)
    path = folder / "captions-text_to_image.safetensors"
    vectors = load_file(path)["embeddings"]
    vectors[3] *= 5.18
    save_file({"embeddings": vectors}, path)
    seal(folder)
    with pytest.raises(UserError, match=r"row 3 has the length 5\.18"):
        bundle.open_bundle(folder)


def test_damaged_cache_of_a_checkpoint_is_built_again(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path))
    item = PredictionItem("x", "数学教程")
    expected = bundle.open_predictor(place.source, place.data).predict([item])
    (cached,) = (tmp_path / "cache" / "bundles").iterdir()
    banks = "captions-text_to_image.safetensors"
    for name in ("manifest.json", "tokenizer.json", banks, "shared.safetensors"):
        data = (cached / name).read_bytes()
        (cached / name).write_bytes(data[:-9] + b"000000000")
        capsys.readouterr()
        assert bundle.open_predictor(place.source, place.data).predict([item]) == expected
        reported = capsys.readouterr().err
        assert "damaged cache" in reported
        assert "it is built again" in " ".join(reported.split())
    bundle.open_predictor(place.source, place.data)
    assert "damaged" not in capsys.readouterr().err
    # A bundle that a user names is not rebuilt.
    folder = copy_bundle(place, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json was altered"):
        bundle.open_predictor(model_source.resolve_model(str(folder)), place.data)


def test_a_wrong_task_is_an_error_of_the_option_and_not_of_a_row(
    place: ServedPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text\n数学\n", encoding="utf-8")
    for words in (["--text", "数学"], [f"--input={rows}"], [f"--input={rows}", "--output=a.csv"]):
        where = ["--model", str(place.bundle), "--task", "text_clasification"]
        assert predict.main([*words, *where]) == 2
        message = capsys.readouterr().err
        assert "error: --task: unknown task 'text_clasification'; did you mean" in message


def test_predictions_and_rejected_rows_are_joined_with_their_input(place, tmp_path, capsys):
    """Rejected rows and files with several functions leave no prediction without its row.

    Reasons of rows that every entry can have are in test_entries.py.
    """
    (tmp_path / "two.py").write_text("def a():\n    pass\n\n\ndef b():\n    pass\n")
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    listed = tmp_path / "out.rejected.jsonl"
    given = ['{"id": "x", "text": "数学"}', "", '{"id": 2, "text": " "}', '{"file": "two.py"}']
    given += ['{"id": [7], "text": "法律"}', '{"id": 9, "text": "a", "task": "no"}', "{"]
    given += ['{"text": "\\ud83d"}', '{"text": "数学", "id": "\\udc00"}']
    rows.write_text("\n".join(given), encoding="utf-8")
    words = ["--input", str(rows), "--text", "历史", "--model", str(place.bundle)]
    assert predict.main([*words, "--output", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    joined = [(line.get("id"), line.get("line"), line["input"].split(":")[-1]) for line in lines]
    assert joined == [
        (None, None, "历史"),
        ("x", 1, "数学"),
        (None, 4, "1 a"),
        (None, 4, "5 b"),
        ([7], 5, "法律"),
    ]
    assert [line.get("source") for line in lines] == [None, *[str(rows)] * 4]
    rejected = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    assert [(row.get("id"), row["line"], row["reason"][:23]) for row in rejected] == [
        (2, 3, "the text is empty"),
        (9, 6, "unknown task 'no'; Know"),
        (None, 7, "not JSON (Expecting pro"),
        (None, 8, "the text has a lone sur"),
        ("\udc00", 9, "the text has a lone sur"),
    ]
    shown = capsys.readouterr()
    said = " ".join((shown.out + shown.err).split())
    assert "数学" not in said
    assert f"5 predictions (text_classification 3, text_to_code 2) in {out}" in said
    assert f"5 rejected rows in {listed}" in said
    # Without an output the table names the rows; an earlier list of rejected rows is outdated.
    assert predict.main(words) == 0
    assert "line" in capsys.readouterr().out
    rows.write_text(given[0], encoding="utf-8")
    assert predict.main([*words, "--output", str(out)]) == 0
    assert not listed.exists()


def test_text_of_the_command_line_with_half_a_character_is_an_error(place, capsys):
    assert predict.main(["--text", "a\udc80", "--model", str(place.bundle)]) == 2
    assert "--text: the text has a lone surrogate" in " ".join(capsys.readouterr().err.split())


# -- concurrent requests ----------------------------------

REQUESTS = 50


def requests() -> list[list[PredictionItem]]:
    """Different requests: texts, queries, images, and a file with two functions."""
    made: list[list[PredictionItem]] = []
    for number in range(REQUESTS):
        picture = io.BytesIO()
        Image.new("RGB", (20 + number, 30), (5 * number, 90, 40)).save(picture, "PNG")
        source = f"def f{number}(x):\n    return x\n\ndef g(y):\n    return {number}\n"
        made.append(
            [
                PredictionItem(f"text {number}", "数学教程经济手册"[: 2 + number % 7]),
                PredictionItem("query", f"红色的{number}", None, "text_to_image"),
                PredictionItem("a.png", None, picture.getvalue()),
                PredictionItem("a.py", None, source.encode()),
            ][number % 2 :]
        )
    return made


def as_documents(predictions: list[TaskPrediction]) -> list[dict[str, Any]]:
    """Return predictions as plain values: the score of an embedding is NaN, and so never equal."""
    return [AnswerLayout(has_embeddings=True).format(each) for each in predictions]


def test_concurrent_predictions_equal_those_one_by_one(place: ServedPlace) -> None:
    predictor, given = place.predictor, requests()
    expected = [as_documents(predictor.predict(items)) for items in given]
    with ThreadPoolExecutor(REQUESTS) as threads:
        found = list(map(as_documents, threads.map(predictor.predict, given)))
    assert found == expected
