"""Training in Python: the numbers of ``skillnet finetune``, own parts, and a complete model."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipelines import finetune
from pipelines.fitting import TrainingData
from skillnet.model import SkillNet
from skillnet.objectives.base import NamedMetric, RowMetric, find_objective
from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_json
from tests.helpers.prepared_corpora import prepare_in_process

SIZES = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16, "embedding_dim": 8}
SETTINGS = {"training.steps": 12, "tasks.topic.batch_size": 8, "tasks.colour.batch_size": 8}
CHANNELS = ("red", "green", "blue")


def make_texts(count: int = 60) -> list[dict[str, Any]]:
    return [
        {"text": f"{('鱼', '鸟', '树')[n % 3]}{n}", "label": ("fish", "bird", "tree")[n % 3]}
        for n in range(count)
    ]


def make_pixels(channel: int, seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 60, (20, 24, 3)).astype(np.uint8)
    pixels[..., channel] += 150
    return pixels


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """All tests here prepare in this process."""
    with pytest.MonkeyPatch.context() as patch:
        prepare_in_process(patch)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    pictures = [
        {
            "image": make_pixels(n % 3, n) if n % 2 else Image.fromarray(make_pixels(n % 3, n)),
            "label": CHANNELS[n % 3],
        }
        for n in range(60)
    ]
    folder = tmp_path_factory.mktemp("fit") / "corpora"
    return TrainingData({"topic": make_texts(), "colour": pictures}, folder, vocabulary=300)


def make_model(data: TrainingData, seed: int = 0) -> SkillNet:
    torch.manual_seed(seed)
    return SkillNet(data.config(**SIZES))


def finetune_same(data: TrainingData, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of ``skillnet finetune`` with the settings of :data:`SETTINGS`."""
    sizes = {f"model.{key}": value for key, value in SIZES.items()}
    corpora = {f"tasks.{task}.corpus": task for task in data.corpora}
    settings = {
        **sizes,
        **corpora,
        **SETTINGS,
        "data": data.folder,
        "run_dir": folder,
        "name": "a",
        "evaluate": "false",
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert finetune.main(words) == 0
    return SkillNet.from_pretrained(folder / "a" / "model").state_dict()


@pytest.mark.integration
def test_a_model_has_the_weights_of_the_command_and_can_be_used(data, tmp_path):
    torch.set_num_threads(1)
    model = make_model(data)
    result = model.fit(data, SETTINGS, output=tmp_path / "mine")
    assert result["step"] == 12
    assert {row["task"] for row in result["evaluation"]} == {"topic", "colour"}
    expected = finetune_same(data, tmp_path)
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    read = SkillNet.from_pretrained(tmp_path / "mine")
    pixels = [make_pixels(0, 100), make_pixels(2, 101)]
    for each in (model, read):
        assert {found.answer for found in each.classify(["鱼", "鸟"], "topic")} <= {
            "fish",
            "bird",
            "tree",
        }
    scores = [[a.score for a in each.classify(pixels, "colour")] for each in (model, read)]
    assert scores[0] == scores[1]
    card = (tmp_path / "mine" / "README.md").read_text("utf-8")
    assert "| topic" in card
    assert "accuracy" in card
    with pytest.raises(UserError, match="mine: exists"):
        model.fit(data, SETTINGS, output=tmp_path / "mine")


def test_an_own_loop_with_the_batches_and_losses_of_the_run_gives_equal_gradients(data):
    model = make_model(data).train()
    tasks = set()
    for batch in data.batches(model, {**SETTINGS, "training.steps": 4}):
        outputs = model(batch.task, batch.towers)
        own = torch.nn.functional.cross_entropy(outputs["logits"], batch.targets["labels"])
        assert torch.allclose(own, data.compute_loss(model, batch, outputs))
        own.backward()
        tasks.add(batch.task)
    assert tasks == {"topic", "colour"}
    with pytest.raises(UserError, match="built in Python"):
        model.classify(["鱼"], "topic")
    data.finish(model)
    assert len(model.classify(["鱼"], "topic")) == 1


class Recorder:
    """Callback and logger that keeps its calls."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.metrics: dict[str, float] = {}
        self.ended = 0
        self._stop_at = stop_at

    def on_train_start(self, folder: Path | None, rank: int) -> None: ...

    def on_step_start(self, step: int) -> None:
        if step == self._stop_at:
            raise KeyboardInterrupt
        self.steps.append(step)

    def start(self, folder: Path, config: dict[str, Any]) -> None: ...

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.metrics |= values

    def finish(self) -> None:
        self.ended += 1


def score_top_two(
    predictions: np.ndarray, targets: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    best_N2 = np.argsort(-predictions, 1)[:, :2]
    hits_N = (best_N2 == targets["labels"][:, None]).any(1)
    return hits_N.astype(float), np.ones(len(hits_N))


def test_own_losses_metrics_callbacks_and_loggers_take_part(data: TrainingData) -> None:
    calls = []

    def scaled_loss(
        outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        calls.append(len(targets["labels"]))
        return 0 * torch.nn.functional.cross_entropy(outputs["logits"], targets["labels"])

    model, recorder = make_model(data), Recorder()
    before = {name: weight.clone() for name, weight in model.heads["topic"].state_dict().items()}
    result = model.fit(
        data,
        SETTINGS | {"training.weight_decay": 0},
        losses={"topic": scaled_loss},
        metrics=[RowMetric("classification", NamedMetric("top_2"), score_top_two)],
        callbacks=[recorder],
        loggers=[recorder],
    )
    assert set(calls) == {8}
    # A loss of zero trains nothing; that of the other task does.
    for name, weight in model.heads["topic"].state_dict().items():
        assert torch.equal(weight, before[name])
    assert result["losses"]["topic"] == 0 < result["losses"]["colour"]
    assert recorder.steps == list(range(12))
    assert recorder.ended == 1
    assert any(name.endswith("test_top_2") for name in recorder.metrics)
    measured = {(row["task"], row["metric"]): row["value"] for row in result["evaluation"]}
    assert measured["colour", "top_2"] >= measured["colour", "accuracy"]
    # Other trainings of this process measure what their objectives say.
    assert "top_2" not in {each.name for each in find_objective("classification").metrics}


def test_an_interrupted_fit_resumes_to_equal_weights(data: TrainingData, tmp_path: Path) -> None:
    settings = SETTINGS | {"training.checkpoint_every": 4, "evaluate": False}
    whole = make_model(data)
    whole.fit(data, settings)
    with pytest.raises(KeyboardInterrupt):
        make_model(data).fit(data, settings, run_dir=tmp_path, callbacks=[Recorder(stop_at=6)])
    # The weights come from the checkpoint, not from the model that is given.
    model, recorder = make_model(data, seed=5), Recorder()
    model.fit(data, settings, run_dir=tmp_path, callbacks=[recorder])
    assert recorder.steps[0] == 4
    done = make_model(data, seed=6)
    assert done.fit(data, settings, run_dir=tmp_path)["step"] == 12
    for each in (model, done):
        for name, weight in whole.state_dict().items():
            assert torch.equal(weight, each.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.stepz": 3}, "unknown key 'training.stepz'.*training.steps"),
        ({"model.dim": 8}, "model.dim: the model and its data decide it"),
        ({"training.workers": 2}, "training.workers is 2"),
        ({"training.steps": 0}, "settings: training.steps: expected"),
        ({"tasks.topics.batch_size": 3}, "topics"),
    ],
)
def test_a_wrong_setting_is_one_sentence(data, settings, message):
    with pytest.raises(UserError, match=message):
        make_model(data).fit(data, settings)


def test_parts_that_do_not_fit_are_named(data: TrainingData) -> None:
    model = make_model(data)
    with pytest.raises(UserError, match=r"losses.topic: .*got \(8, 3\)"):
        model.fit(data, SETTINGS, losses={"topic": lambda outputs, targets: outputs["logits"]})
    with pytest.raises(UserError, match=r"losses.*topics.*did you mean 'topic'"):
        model.fit(data, SETTINGS, losses={"topics": score_top_two})
    with pytest.raises(UserError, match=r"the model has the tasks .* lacks colour"):
        model.fit({"topic": make_texts()}, SETTINGS)
    wrong = make_model(data)
    with pytest.raises(UserError, match=r"options.topics: no such task"):
        TrainingData({"topic": make_texts()}, options={"topics": {}})
    with pytest.raises(ValueError, match="accuracy, which classification has"):
        wrong.fit(
            data,
            SETTINGS,
            metrics=[RowMetric("classification", NamedMetric("accuracy"), score_top_two)],
        )
    assert "top_2" not in {each.name for each in find_objective("classification").metrics}


def test_prepared_corpora_are_used_where_they_are(data: TrainingData, tmp_path: Path) -> None:
    again = TrainingData({"theme": data.folder / "topic", "colour": str(data.folder / "colour")})
    assert again.folder == data.folder
    assert again.corpora == {"theme": "topic", "colour": "colour"}
    with pytest.raises(UserError, match="prepare them in one folder"):
        TrainingData({"topic": data.folder / "topic", "more": make_texts()}, tmp_path)


def test_no_network_library_is_needed(tmp_path: Path) -> None:
    """A script from raw rows to a saved model loads neither Ray nor MLflow nor a compiler."""
    rows = json.dumps(make_texts(30))
    script = (
        "import json, sys\n"
        "from pipelines.fitting import TrainingData\n"
        "from skillnet import SkillNet\n"
        f"data = TrainingData({{'topic': json.loads({rows!r})}}, vocabulary=300)\n"
        f"model = SkillNet(data.config(**{SIZES!r}))\n"
        f"model.fit(data, {{'training.steps': 2}}, output={str(tmp_path / 'out')!r})\n"
        "print([name for name in ('ray', 'mlflow', 'torch._dynamo') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "tokenizer.json" in read_json(tmp_path / "out" / "manifest.json")["serving"]["files"]


@pytest.mark.parametrize("kind", ["table", "splits", "frame"])
def test_tables_of_any_kind_give_equal_corpora(kind: str, tmp_path: Path) -> None:
    rows = make_texts(30)
    train, test = rows[:24], rows[24:]
    source: Any
    if kind == "table":
        source = pa.Table.from_pylist(
            [row | {"split": "test" if n >= 24 else "train"} for n, row in enumerate(rows)]
        )
    elif kind == "frame":
        pandas = pytest.importorskip("pandas")
        source = {"train": pandas.DataFrame(train), "test": pandas.DataFrame(test)}
    else:
        source = {"train": train, "test": test}
    found = TrainingData({"topic": source}, tmp_path, vocabulary=300).prepared["topic"]
    assert len(found.splits["test"].table()) == 6
    assert found.manifest["labels"] == ["bird", "fish", "tree"]


def test_media_may_be_paths_sounds_or_bytes(tmp_path: Path) -> None:
    Image.fromarray(make_pixels(0, 0)).save(tmp_path / "a.png")
    Image.fromarray(make_pixels(1, 1)).save(tmp_path / "b.png")
    paths = [
        {"image": tmp_path / "a.png", "label": "a"},
        {"image": tmp_path / "b.png", "label": "b"},
    ]
    content = [row | {"image": row["image"].read_bytes()} for row in paths]
    noise = np.random.default_rng(0).standard_normal((2, 4000)).astype(np.float32) / 4
    sounds = [{"audio": (noise[n], 16000), "label": "ab"[n]} for n in range(2)]
    found = TrainingData(
        {"paths": paths, "bytes": content, "sounds": sounds},
        tmp_path / "data",
        options={name: {"validation": 0, "test": 0} for name in ("paths", "bytes", "sounds")},
    ).prepared
    pixels = [
        found[task].splits["train"].table()["pixels"].to_pylist() for task in ("paths", "bytes")
    ]
    assert sorted(pixels[0]) == sorted(pixels[1])
    assert len(found["sounds"].splits["train"].table()) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "topic: no rows"),
        ("missing.csv", "missing.csv"),
        (3, "topic: expected a data frame.* got int"),
        ([("鱼", "fish")], "topic, row 0: expected a mapping"),
        ([{"text": object(), "label": "a"}], "topic, row 0: text is object"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "x"}], "column label mixes kinds"),
        ([{1: "a"}], "a column is named 1"),
        ({"train": [{"text": "a"}], 3: []}, "the rows of each split by its name"),
        # Errors of readers name no file that the user does not have.
        ([{"foo": 1}], "^the rows of topic: no text field among foo; give options.topic.text"),
    ],
)
def test_rows_that_cannot_be_read_are_named(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        TrainingData({"topic": rows}, tmp_path)


def test_preparing_rows_in_memory_says_what_was_rejected_and_names_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"字{n % 40}", "label": "ab"[n % 2]} for n in range(200)]
    bad = [{"text": "", "label": "a"}, {"text": "字", "label": None}, {"text": "", "label": "b"}]
    TrainingData({"topic": rows + bad}, tmp_path / "data")
    printed = capsys.readouterr().err
    assert "topic: 200 rows prepared\n" in printed
    assert "topic: rejected rows: 2 an empty text, 1 no label. topic/quarantine.jsonl" in printed
    # The total is known once all rows are read.
    assert "preparing: 200/200 rows" in printed
    assert "--options" not in printed

    # Warnings name rows and options, too: here the one about classes that are numbers.
    numbers = [{"text": f"字{n}", "label": str(n % 30)} for n in range(200)]
    TrainingData({"topic": numbers}, tmp_path / "further")
    printed = capsys.readouterr().err
    assert "warning: the rows of topic: " in printed
    assert "--options" not in printed
