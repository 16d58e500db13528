"""From a checkpoint into the registry and back: the same answers, nothing else needed."""

import base64
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipelines import evaluate, finetune, verify
from pipelines.data.shards.dataset import open_corpus
from pipelines.data.transforms import image
from pipelines.serving import registration
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.evaluation.inference import InferenceRunner, memory_inputs
from pipelines.training.evaluation.tables import flat_metrics
from pipelines.training.runs import model_source
from skillnet.model import SkillNet
from skillnet.systems import build_system
from skillnet_platform.errors import UserError
from skillnet_platform.storage import run_root
from skillnet_platform.tracking import TrackingConfig, backend, champion, registry
from tests.helpers.readable_corpora import COLOURS, SHAPES, SUBJECTS, config
from tests.helpers.registered_model import Place, registered
from tests.helpers.small_run import SMALL_RUN, option_arguments
from tests.helpers.tracked_runs import find_champion, load_registered

pytestmark = pytest.mark.integration
CHAMPION = "models:/skillnet@champion"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield from registered(tmp_path_factory)


def read_error(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def heart() -> bytes:
    picture = np.full((60, 80, 3), 255, np.uint8)
    picture[20:40, 30:50] = (220, 40, 50)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_first_version_is_champion(place: Place):
    assert place.made.uri == "models:/skillnet/1"
    assert place.made.alias == "champion"
    version = find_champion()
    assert int(version.version) == 1
    assert "A first try." in version.description
    assert "text_to_image" in version.description
    assert version.tags["corpus.drawings"] == open_corpus(place.data / "drawings").digest


def test_predictions_equal_those_of_the_checkpoint(place: Place):
    """The whole way (MLflow, bundle, tokenizer, transforms) against the bare model."""
    loaded = load_registered(CHAMPION)
    texts, encoded = ["古代文学研究", "数学教程"], base64.b64encode(heart()).decode()
    answers = loaded.predict(pd.DataFrame([{"text": t} for t in texts] + [{"file": encoded}]))

    model = SkillNet.from_pretrained(place.saved)
    runner = InferenceRunner(model)
    from pipelines.data.tokenizer import training as tokenizer_training

    words = tokenizer_training.load_tokenizer(place.data / "tokenizer.json")
    rows = [np.array(words.encode(t).ids, np.int32) for t in texts]
    plan = model.config.tasks["text_classification"].towers["input"]
    expected = runner.predict_rows("text_classification", memory_inputs(rows, plan, model.config))
    for number in range(2):
        order = np.argsort(-expected[number], kind="stable")[:5]
        assert answers["alternatives"][number] == [SUBJECTS[i] for i in order]
        np.testing.assert_array_equal(
            np.array(answers["scores"][number], np.float32), expected[number][order]
        )
    plan = model.config.tasks["text_to_image"].towers["candidate"]
    vector = runner.embed(
        "text_to_image",
        "candidate",
        memory_inputs([image.load_pixels(heart())], plan, model.config),
    )[0]
    np.testing.assert_array_equal(np.array(answers["embedding"][2], np.float32), vector)
    assert answers["answer"][2] in {f"{c}的{s}" for c in COLOURS for s in SHAPES}


@pytest.mark.parametrize(
    "given", [["历史", "数学"], pd.Series(["历史"]), pd.DataFrame({"sentence": ["历史"]})]
)
def test_an_input_without_a_known_column_is_refused(place: Place, given: Any) -> None:
    """MLflow drops what the signature does not name, so nothing would be predicted."""
    loaded = load_registered(CHAMPION)
    with pytest.raises(UserError, match=r"no column text or file. Give a table: pandas.DataFrame"):
        loaded.predict(given)


def test_evaluation_through_the_registry_is_that_of_the_checkpoint(place: Place, capsys):
    assert evaluate.main(["--data", str(place.data), "--bootstrap_samples", "50", "--json"]) == 0
    through = json.loads(capsys.readouterr().out)["rows"]
    direct = evaluate_model(SkillNet.from_pretrained(place.saved), place.data, bootstrap_samples=50)
    assert [r["value"] for r in through] == [r["value"] for r in direct]
    run = backend.create_client(backend.resolve_uri()).get_run(place.made.run_id)
    logged = run.data.metrics
    for name, value in flat_metrics(direct).items():
        assert logged[name] == pytest.approx(value)
    assert run.info.status == "FINISHED"


def test_nothing_is_pickled_and_the_package_is_named(place: Place):
    folder = registry.resolve_registered(CHAMPION).path
    suffixes = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin"}
    assert "skillnet-platform==" in (folder / "requirements.txt").read_text()
    assert (folder / "MLmodel").is_file()


def test_an_equal_model_stays_challenger(place: Place, tmp_path: Path):
    # Other bytes with the same answers: the same bytes would be the same version.
    model = SkillNet.from_pretrained(place.saved)
    with torch.no_grad():
        next(model.parameters()).mul_(1 + 1e-6)
    model.save_pretrained(tmp_path / "equal")
    source = model_source.resolve_model(str(tmp_path / "equal"))
    again = registration.register_model(source, place.data, bootstrap_samples=50)
    assert again.alias == "challenger"
    assert "better on no task" in str(again.verdict)
    assert int(find_champion().version) == 1
    forced = registration.register_model(source, place.data, bootstrap_samples=50, force=True)
    assert (forced.alias, forced.version) == ("champion", again.version)
    assert int(find_champion().version) == forced.version


def test_a_baseline_is_registered_under_its_own_name(place: Place, tmp_path: Path, capsys):
    before = find_champion().version
    build_system("dense", config()).save_pretrained(tmp_path / "dense" / "model")
    (tmp_path / "dense" / "config.yaml").write_text("system: dense\n")
    source = model_source.resolve_model(str(tmp_path / "dense"))
    with pytest.raises(champion.OtherSystemError, match="is a dense model"):
        registration.register_model(source, place.data, name="skillnet", rows=[])
    made = registration.register_model(source, place.data, rows=[])
    assert (made.uri, made.alias) == ("models:/skillnet-dense/1", "champion")
    assert find_champion().version == before
    chosen = {"registered_model": "mine", "experiment": "clue"}
    for tracking, name in ((chosen, "mine"), ({"experiment": "clue"}, "clue-dense")):
        source = dataclasses.replace(source, settings={"tracking": tracking})
        assert registration.register_model(source, place.data, rows=[]).uri == f"models:/{name}/1"
    # A run that names the model of another system stops before its training.
    words = ["--name", "rejected", "--data", str(place.data), "--system", "dense"]
    words += ["--tracking.registered_model", "skillnet"]
    assert finetune.main([*words, *option_arguments(SMALL_RUN)]) == 2
    assert "is a skillnet model, and this model is a dense model" in read_error(capsys)
    assert not (run_root() / "rejected").exists()
    unregistered = TrackingConfig(register=False, registered_model="skillnet")
    registration.check_given_name(unregistered, "dense")
    # If another process registered it meanwhile, the run is kept.
    about = {"system": "dense", "tracking": {"registered_model": "skillnet"}}
    (tmp_path / "dense" / "config.yaml").write_text(json.dumps(about))
    run = FinetuneConfig(data=str(place.data))
    assert finetune.register_run(run, tmp_path / "dense", [{}]) is None
    assert "this model is a dense model" in read_error(capsys)


def test_corpora_of_other_outputs_are_refused(place: Place, tmp_path: Path):
    other = config()
    task = other.tasks["text_classification"]
    other.tasks["text_classification"] = type(task)("classification", task.towers, outputs=9)
    SkillNet(other).save_pretrained(tmp_path / "nine")
    with pytest.raises(UserError, match="has 15 labels, the model was built for 9"):
        registration.register_model(
            model_source.resolve_model(str(tmp_path / "nine")), place.data, rows=[]
        )


def test_a_run_of_another_tracker_is_no_obstacle(place: Place, tmp_path: Path, capsys):
    run = tmp_path / "from-elsewhere"
    shutil.copytree(place.saved, run / "model")
    (run / "config.yaml").write_text("seed: 1\n")
    (run / "run.json").write_text('{"run_id": "' + 32 * "0" + '"}')
    assert (
        evaluate.main(["--model", str(run), "--data", str(place.data), "--bootstrap_samples", "20"])
        == 0
    )
    assert "is not in this tracker" in capsys.readouterr().err
    made = registration.register_model(
        model_source.resolve_model(str(run)), place.data, name="other", bootstrap_samples=20
    )
    recorded = backend.create_client(backend.resolve_uri()).get_run(made.run_id)
    assert recorded.data.tags["trained_as"] == 32 * "0"
    assert recorded.info.status == "FINISHED"


def states(place: Place, data: Path | None = None) -> dict[str, str]:
    checks = verify.verify(verify.VerifyConfig(CHAMPION, str(data or place.data)))
    return {check.subject: check.state for check in checks}


def test_verify_passes_and_says_what_is_absent(place: Place, tmp_path: Path):
    found = states(place)
    assert set(found.values()) == {"ok"}
    assert {"weights", "bundle", "registry", "run", "corpus strokes", "tokenizer"} <= set(found)
    found = states(place, tmp_path)
    assert {what for what, state in found.items() if state == "absent"} == {
        "corpus headings", "corpus syllables", "corpus drawings", "corpus strokes",
        "corpus functions", "tokenizer",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("strokes/train-00000.arrow", "corpus strokes"),
        ("headings/manifest.json", "corpus headings"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_verify_finds_an_altered_byte_of_the_data(place: Place, tmp_path: Path, file, what):
    copy = tmp_path / "corpora"
    shutil.copytree(place.data, copy)
    flip(copy / file)
    found = states(place, copy)
    assert [name for name, state in found.items() if state == "altered"] == [what]


@pytest.mark.parametrize(
    "file", ["skill-text.safetensors", "tokenizer.json", "captions-text_to_code.safetensors"]
)
def test_an_altered_bundle_is_found_and_refused(place: Place, capsys, file):
    bundle = registry.resolve_registered(CHAMPION).path / "artifacts" / model_source.BUNDLE
    original = (bundle / file).read_bytes()
    flip(bundle / file)
    try:
        assert verify.main([CHAMPION, "--data", str(place.data)]) == 1
        assert "altered" in capsys.readouterr().err
        with pytest.raises(ValueError, match="altered"):
            load_registered(CHAMPION)
    finally:
        (bundle / file).write_bytes(original)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
