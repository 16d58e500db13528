"""Models read raw inputs as `skillnet predict` does, without Ray and MLflow."""

import io
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.runs import model_source
from pipelines.serving import bundle
from skillnet import SkillNet
from tests.helpers.readable_corpora import config, write_corpora

CODE = "def send(message):\n    return client.post(message)\n"
#: Compares the methods of a model with the command's predictions, in one process.
COMPARED = """
import sys
from pathlib import Path
from skillnet_platform.package_extras import EXTRA_OF_PACKAGE

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA_OF_PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import numpy as np
from PIL import Image
from pipelines.predict import PredictConfig, predict_rows
from skillnet import SkillNet

folder, media = Path(sys.argv[1]), Path(sys.argv[2])
model = SkillNet.from_pretrained(folder)
files = [str(media / name) for name in ("a.png", "a.wav", "a.py", "a.txt")]
answered = predict_rows(PredictConfig(files=files, model=str(folder))).answered
image, sound, code, text = [found for _, found in answered]
with Image.open(files[0]) as picture:
    np.testing.assert_array_equal(model.encode_image([picture])[0], np.float32(image.embedding))
np.testing.assert_array_equal(model.encode_code([CODE])[0], np.float32(code.embedding))
samples = np.load(media / "a.npy")
assert model.transcribe([(samples, 8000)]) == [sound.answer]
assert model.classify(["红色方块"]) == [text.__class__(**{**vars(text), "input": "红色方块"})]
assert model.encode_audio([(samples, 8000)]).shape == (1, model.config.dim)
from skillnet_platform.cli import main
assert main(["predict", "--text", "x", "--model", "models:/skillnet@champion"]) == 2
""".replace("[CODE]", f"[{CODE!r}]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("processor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(root))
        torch.manual_seed(0)
        SkillNet(config()).save_pretrained(root / "saved")
        source = model_source.resolve_model(str(root / "saved"))
        yield bundle.build_bundle(source, write_corpora(root / "corpora"), root / "bundle")


def test_methods_equal_predictions_without_ray_and_mlflow(folder: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "a.txt").write_text("红色方块", encoding="utf-8")
    samples = (np.sin(np.arange(4000) / 5) * 9000).astype(np.int16)
    np.save(tmp_path / "a.npy", samples)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    command = [sys.executable, "-c", COMPARED, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Install the extra train: pip install 'skillnet-platform[train]'" in done.stderr


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
    texts, videos = model.encode_text(["横"]), model.encode_video([frames])
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
        (lambda: model.encode_text([3]), "input 0: expected a text, not int"),
        (lambda: model.encode_image([np.zeros((4, 4, 3))]), "input 0: pixels are float64"),
        (lambda: model.encode_audio([np.zeros(4)]), r"input 0: expected \(samples, rate"),
        (lambda: model.encode_audio([(np.zeros(0, "f"), 8000)]), "input 0: empty audio"),
        (lambda: model.encode_video([np.zeros((2, 3), np.uint8)]), "input 0: frames are uint8"),
        (lambda: model.encode_code(["x = 1"]), "input 0: the file has no functions"),
        (lambda: model.encode_code([CODE + CODE]), "input 0: 2 functions"),
        (lambda: model.encode_image([b"x"], task="text_to_code"), "text_to_code does not read"),
        (lambda: model.classify(["a"], task="text_to_code"), "a retrieval task"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    SkillNet(config()).save_pretrained(tmp_path / "weights")
    with pytest.raises(ValueError, match="without tokenizer"):
        SkillNet.from_pretrained(tmp_path / "weights").encode_text(["a"])
    with pytest.raises(ValueError, match="not read from a folder"):
        SkillNet(config()).encode_text(["a"])
