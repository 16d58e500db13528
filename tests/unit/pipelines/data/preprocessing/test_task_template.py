"""``skillnet init-task``: its file trains the task of a corpus, without another setting."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import init_task
from pipelines.training.config.run import FinetuneConfig, PretrainConfig
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from pipelines.training.loop.run import validate_run
from skillnet_platform.config import parse_config
from tests.helpers import user_corpora
from tests.helpers.prepared_corpora import change_corpus
from tests.helpers.small_corpora import MODALITY, write_corpora

SMALL = ("--model.dim", "16", "--model.num_layers", "1", "--model.num_heads", "2")
SMALL += ("--training.steps", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", pretrain=12)


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def init(*words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    capsys.readouterr()
    assert init_task.main([*words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("corpus", MODALITY)
def test_the_file_of_a_prepared_corpus_trains_its_task_and_no_other(corpus, data, run_root, capsys):
    written = init(str(data / corpus), "--name", "mine", "--file", "mine.yaml", capsys=capsys)
    assert written["task"] == "mine"
    words = ["--config", "small", "--config", "mine.yaml", *SMALL]
    run = resolve_run(parse_config(FinetuneConfig, words, "skillnet finetune"))
    assert list(run.config.tasks) == list(run.config.model.tasks) == ["mine"]
    validate_run(run)
    assert train_model(ResolvedRun(run.config)).step == 2


def test_outputs_and_sizes_follow_the_manifest(data, tmp_path, run_root, capsys):
    copied = tmp_path / "corpora" / "headings"
    shutil.copytree(data / "headings", copied)
    labels = [f"class {number}" for number in range(33)]
    change_corpus(copied, labels=labels, preprocessing={"max_tokens": 300})
    init(str(copied), capsys=capsys)
    assert "outputs:" not in Path("headings.yaml").read_text(encoding="utf-8")
    words = ["--config", "headings.yaml", *SMALL]
    run = resolve_run(parse_config(FinetuneConfig, words, "skillnet finetune"))
    assert run.config.model.tasks["text_classification"].outputs == 33
    assert run.config.model.max_tokens == 300
    validate_run(run)


def test_the_file_of_own_pictures_names_the_command_that_prepares_them(tmp_path, run_root, capsys):
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.png")
    written = init("pets", capsys=capsys)
    assert (written["file"], written["objective"]) == ("pets.yaml", "classification")
    prepare, train = written["commands"]
    assert prepare.startswith("skillnet prepare --corpus pets=folder:")
    assert train == "skillnet finetune --config small --config pets.yaml"
    config = parse_config(FinetuneConfig, ["--config", "pets.yaml"], "skillnet finetune")
    assert {name: task.corpus for name, task in config.tasks.items()} == {
        "image_classification": "pets"
    }
    # A second call keeps the file, which the user may have changed.
    assert init_task.main(["pets"]) == 2
    assert "pets.yaml: exists already" in capsys.readouterr().err


def test_rows_without_annotations_are_pretrained(data, tmp_path, run_root, capsys):
    (tmp_path / "lines").mkdir()
    rows = [json.dumps({"text": f"第{number}行"}) for number in range(20)]
    (tmp_path / "lines" / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    written = init("lines", capsys=capsys)
    assert written["task"] == "masked_text"
    config = parse_config(PretrainConfig, ["--config", "lines.yaml"], "skillnet pretrain")
    assert list(config.joint().tasks) == ["masked_text"]
    assert init_task.main([str(tmp_path / "none")]) == 2


def test_options_of_the_reader_decide_the_task(data, tmp_path, capsys):
    rows = [{"text": f"text {n}", "stars": n % 5} for n in range(20)]
    user_corpora.write_lines(tmp_path / "films" / "rows.jsonl", rows)
    words = ["--options.folder.label", "stars", "--options.folder.task", "values"]
    made = init(str(tmp_path / "films"), *words, capsys=capsys)
    assert made["objective"] == "regression"
    assert "--options.films.task values" in made["commands"][0]
    assert init_task.main([str(data / "headings"), *words]) == 2
    assert "is prepared already" in capsys.readouterr().err
