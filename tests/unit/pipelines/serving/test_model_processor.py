"""Models read raw inputs as `skillnet predict` does, without Ray and MLflow."""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from pipelines.data.tokenizer.training import train_tokenizer
from pipelines.serving.inputs import PredictionItem
from pipelines.serving.model_processor import ModelProcessor
from pipelines.serving.predictor import TaskPredictor
from skillnet import SkillNet
from skillnet.skills import known_tasks
from skillnet_platform.cli import main
from skillnet_platform.errors import UserError
from tests.helpers.processes import run_python
from tests.helpers.readable_corpora import config
from tests.helpers.served_place import ServedPlace

CODE = "def send(message):\n    return client.post(message)\n"
#: Uses a model and the command without the packages of the extras, such as Ray and MLflow.
BARE = """
import sys
from skillnet_platform.package_version import EXTRA_OF_PACKAGE

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA_OF_PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from pipelines.predict import PredictConfig, predict_rows
from skillnet import SkillNet
from skillnet_platform.cli import main

((_, found),) = predict_rows(PredictConfig(text="红色方块", model=sys.argv[1])).answered
assert SkillNet.from_pretrained(sys.argv[1]).classify(["红色方块"]) == [found]
assert main(["predict", "--text", "x", "--model", "models:/skillnet@champion"]) == 2
"""


@pytest.fixture
def folder(place: ServedPlace) -> Path:
    return place.bundle


def test_methods_equal_predictions_without_ray_and_mlflow(folder: Path) -> None:
    done = run_python("-c", BARE, folder)
    assert done.returncode == 0, done.stderr
    assert (
        "Install the extra train: in a clone, pip install -e plugins/evidence -e '.[train]'"
        in done.stderr
    )


def test_processor_returns_the_batch_of_a_tower(folder: Path) -> None:
    # In float64 the command would not round to bfloat16 either.
    model = SkillNet.from_pretrained(folder, "text_to_image").double()
    batch = model.processor(["红色方块", "圆"], "text_to_image", "query")
    vectors = model.embed("text_to_image", "query", batch)
    encoded = model.encode_text(["红色方块", "圆"]).as_subclass(torch.Tensor)
    torch.testing.assert_close(vectors.float(), encoded)


def test_vectors_of_two_tasks_are_not_compared(folder: Path) -> None:
    model = SkillNet.from_pretrained(folder)
    frames = np.zeros((4, 20, 30, 1), np.uint8)
    frames[:, :, 9:20] = 255
    texts = model.encode_text(["横"], task="text_to_image")
    videos = model.encode_video([frames])
    with pytest.raises(ValueError, match="cannot be compared"):
        model.similarity(texts, videos)
    similar = model.similarity(model.encode_text(["横", "竖"], task="text_to_video"), videos)
    assert similar.shape == (2, 1)
    assert (similar.abs() <= 1 + 1e-5).all()


def test_unreadable_inputs_have_a_message(folder: Path, tmp_path: Path) -> None:
    model = SkillNet.from_pretrained(folder)
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "PNG")
    assert len(model.encode_image([data.getvalue()])) == 1
    for call, words in (
        (lambda: model.encode_text("横"), "expected a list"),
        (lambda: model.encode_text([3], task="text_to_image"), "input 0: expected a text, not int"),
        (lambda: model.encode_image([np.zeros((4, 4, 3))]), "input 0: pixels are float64"),
        (lambda: model.encode_audio([np.zeros(4)]), r"input 0: expected \(samples, rate"),
        (lambda: model.encode_audio([(np.zeros(0, "f"), 8000)]), "input 0: empty audio"),
        (lambda: model.encode_video([np.zeros((2, 3), np.uint8)]), "input 0: frames are uint8"),
        (lambda: model.encode_code(["x = 1"]), "input 0: the file has no functions"),
        (lambda: model.encode_code([CODE + CODE]), "input 0: 2 functions"),
        (
            lambda: model.encode_image([b"x"], task="text_to_code"),
            "text_to_code reads code or text, this is image",
        ),
        (
            lambda: model.classify(["a"], task="text_to_code"),
            "is a retrieval task, expected classification or multi_label",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    SkillNet(config()).save_pretrained(tmp_path / "weights")
    with pytest.raises(ValueError, match="without tokenizer"):
        SkillNet.from_pretrained(tmp_path / "weights").encode_text(["a"])
    with pytest.raises(ValueError, match="built in Python"):
        SkillNet(config()).encode_text(["a"], task="text_to_image")


@pytest.mark.parametrize("is_saved", [False, True])
def test_the_remedy_for_a_model_without_tokenizer_helps(folder, tmp_path, monkeypatch, is_saved):
    """A model that was built in Python, with a task of its own, follows its message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKILLNET_HOME", str(folder.parent))
    task = dataclasses.replace(known_tasks()["text_classification"], outputs=15)
    model = SkillNet(dataclasses.replace(config(), tasks={"subjects": task}))
    if is_saved:
        model.save_pretrained(tmp_path / "weights")
        model = SkillNet.from_pretrained(tmp_path / "weights")
    with pytest.raises(UserError) as error:
        _ = model.processor
    words = str(error.value)
    if not is_saved:
        saved = re.findall(r'save_pretrained\("([^"]+)"\)', words)
        model.save_pretrained(*saved)
    command = re.findall(r"`skillnet ([^`]+)`", words)[0].split()
    assert main([*command, "--corpora.subjects", "headings"]) == 0
    again = SkillNet.from_pretrained(*re.findall(r'from_pretrained\("([^"]+)"\)', words))
    assert again.classify(["历史研究"])[0].task == "subjects"
    assert again.processor.tokenizer.get_vocab_size()


def model_of(*names: str) -> SkillNet:
    """A model of some tasks that knows its tokenizer and classes."""
    torch.manual_seed(0)
    tasks = {name: dataclasses.replace(known_tasks()[name], outputs=3) for name in names}
    model = SkillNet(dataclasses.replace(config(), tasks=tasks))
    words = Tokenizer.from_str(train_tokenizer(["心"], []))
    entries = {name: {"names": "abc", "limit": None, "preprocessing": {}} for name in tasks}
    model._processor = ModelProcessor(TaskPredictor(model, words, entries))
    return model


TEXT, IMAGE, SOUND = "text_classification", "image_classification", "speech_recognition"
ARRAY = np.zeros((8, 8, 3), np.uint8)
#: Name of an input -> the input; the files are in the working directory.
INPUTS = {
    "text": "心",
    "file": "heart.png",
    "no file": "absent.png",
    "no media": "absent.mp3",
    "text file": "heart.txt",
    "path": Path("heart.png"),
    "text path": Path("heart.txt"),
    "code path": Path("heart.py"),
    "no path": Path("absent.png"),
    "bytes": b"",
    "Pillow": Image.new("RGB", (8, 8)),
    "array": ARRAY,
    "sound": (np.zeros(4000, np.int16) + 9, 8000),
}
NO_FILE, NAME = "no such file", "names a file"
#: Tasks of the model, method, its options -> input -> task that reads it, or words of the refusal.
#: Other inputs are refused with any message.
RULES = [
    ((TEXT,), "classify", {}, {"text": TEXT, "file": NAME, "no file": NAME, "no media": NAME,
     "text file": NAME, "path": f"{TEXT} reads text, this is image", "text path": TEXT,
     "code path": "this is code", "no path": NO_FILE}),
    ((TEXT,), "classify", {"task": TEXT}, {"text": TEXT, "file": TEXT, "no file": TEXT,
     "no media": TEXT, "text file": TEXT, "path": "this is image", "text path": TEXT}),
    ((IMAGE,), "classify", {}, {"text": NO_FILE, "file": IMAGE, "no file": NO_FILE,
     "no media": NO_FILE, "path": IMAGE, "no path": NO_FILE, "bytes": IMAGE, "Pillow": IMAGE,
     "array": IMAGE}),
    ((TEXT, IMAGE), "classify", {}, dict.fromkeys(INPUTS, "several tasks .*: .*, .*task=")),
    ((TEXT, IMAGE), "classify", {"task": TEXT}, {"text": TEXT, "file": TEXT, "no file": TEXT,
     "no media": TEXT, "text file": TEXT, "text path": TEXT}),
    ((TEXT, IMAGE), "classify", {"task": IMAGE}, {"text": NO_FILE, "file": IMAGE, "path": IMAGE,
     "bytes": IMAGE, "Pillow": IMAGE, "array": IMAGE}),
    ((TEXT, "image_multi_label"), "classify", {}, dict.fromkeys(INPUTS, "several")),
    ((TEXT, SOUND), "classify", {}, {"text": TEXT, "file": NAME, "text path": TEXT}),
    ((SOUND,), "classify", {}, dict.fromkeys(INPUTS, "no classification or multi_label task")),
    ((TEXT, SOUND), "transcribe", {}, {"text": NO_FILE, "no media": NO_FILE, "sound": SOUND}),
    ((TEXT,), "transcribe", {}, dict.fromkeys(INPUTS, "no ctc task")),
    ((IMAGE,), "encode_image", {}, {"text": NO_FILE, "file": IMAGE, "path": IMAGE,
     "bytes": IMAGE, "Pillow": IMAGE, "array": IMAGE, "no file": NO_FILE}),
    ((IMAGE, "text_to_image"), "encode_image", {}, dict.fromkeys(
        ("file", "path", "bytes", "Pillow", "array"), "text_to_image") | {"text": NO_FILE}),
    ((IMAGE, "image_multi_label"), "encode_image", {}, dict.fromkeys(INPUTS, "several")),
    (("text_to_image", "text_to_video"), "encode_text", {}, dict.fromkeys(INPUTS, "several")),
    (("text_to_image",), "encode_text", {}, dict.fromkeys(
        ("text", "file", "no file", "no media", "text file", "text path"), "text_to_image")
     | {"path": "this is image"}),
    (("text_to_code",), "encode_code", {}, {"code path": "text_to_code", "text": "no functions",
     "text path": "this is text"}),
    ((SOUND,), "encode_audio", {}, {"sound": SOUND, "text": NO_FILE, "no media": NO_FILE}),
]  # fmt: skip


@pytest.mark.parametrize(("tasks", "method", "options", "rules"), RULES)
def test_each_method_reads_or_refuses_each_kind_of_input(
    tasks, method, options, rules, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("heart.png")
    Path("heart.txt").write_text("心", encoding="utf-8")
    Path("heart.py").write_text(CODE, encoding="utf-8")
    inputs = INPUTS | {"bytes": Path("heart.png").read_bytes()}
    model = model_of(*tasks)
    for name, given in inputs.items():
        expected = rules.get(name, "input 0|heart|absent")
        if expected not in tasks:
            with pytest.raises(UserError, match=expected):
                getattr(model, method)([given], **options)
                pytest.fail(f"{name} was read")
            continue
        found = getattr(model, method)([given], **options)
        assert len(found) == 1, name
        if method.startswith("encode"):
            assert found.task == expected, name
        elif method == "classify":
            assert [each.task for each in found] == [expected], name


@pytest.mark.parametrize(
    ("tasks", "item", "expected"),
    [
        ((TEXT, IMAGE), PredictionItem("heart.png", "heart.png"), TEXT),
        ((TEXT, IMAGE), PredictionItem("heart.png", data=b"png"), IMAGE),
        ((TEXT, "text_multi_label"), PredictionItem("x", "x"), "several tasks .* read text: "),
        ((TEXT, "text_multi_label"), PredictionItem("x", "x", task=TEXT), TEXT),
        ((IMAGE, "text_to_image"), PredictionItem("a.png", data=b"png"), "several tasks"),
        ((TEXT, "text_to_image"), PredictionItem("x", "x"), TEXT),
        (("text_to_image", "masked_text"), PredictionItem("x", "x"), "no task .* reads text"),
        ((IMAGE, "masked_image"), PredictionItem("a.png", data=b"png"), IMAGE),
        (
            ("masked_text",),
            PredictionItem("x", "x", task="masked_text"),
            "is a masked task, expected classification",
        ),
        (("image_to_video", "image_to_sound"), PredictionItem("a.png", data=b"png"), "several"),
    ],
)
def test_predictions_of_rows_do_not_guess_between_tasks(tasks, item, expected):
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    predictor = model_of(*tasks).processor._predictor
    given = dataclasses.replace(item, data=item.data and data.getvalue())
    if expected in tasks:
        assert [each.task for each in predictor.predict([given])] == [expected]
        return
    with pytest.raises(UserError, match=expected):
        predictor.predict([given])
