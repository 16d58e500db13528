"""Packages that add a format and a modality by entry points, as any user installs them."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipelines import inspect, predict, prepare
from pipelines.data.preprocessing.task_template import describe_task
from pipelines.data.shards.dataset import open_corpus
from pipelines.serving import bundle
from pipelines.training.config.run import TaskTraining
from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_dataloader
from pipelines.training.runs import model_source
from skillnet import SkillNet
from skillnet.config import SkillNetConfig
from skillnet.skills import DEFAULT_SKILLS, known_tasks
from skillnet.systems import build_system
from skillnet_planning.example_batches import build_example_batch
from skillnet_platform.errors import UserError
from skillnet_serving.model_export import export_bundle
from skillnet_serving.search import SearchConfig, search_corpus
from skillnet_serving.server.config import ServeConfig, ServerLimits
from skillnet_serving.server.served_model import ServedModel
from tests.helpers.installed_entries import forget_entries
from tests.helpers.local_server import run_service
from tests.helpers.processes import run_python
from tests.helpers.small_corpora import small_config

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
LIMITS = ServerLimits(max_bytes=200_000, max_rows=3, max_requests=4, timeout_s=60.0)
#: Steps of the longest series of the corpus.
STEPS = 24


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, installed as any other."""
    root = tmp_path_factory.mktemp("package")
    sources = [root / name for name in ("corpora_package", "plugin_package")]
    for source in sources:
        shutil.copytree(ROOT / "tests" / source.name, source)
    what = ("--no-deps", "--no-build-isolation", "--no-index", "--target", str(root / "installed"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *what, *map(str, sources)]
    subprocess.run(pip, check=True)
    return root / "installed"


@pytest.fixture(scope="module")
def poems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty poems, one of them empty."""
    folder = tmp_path_factory.mktemp("poems")
    for number in range(30):
        text = f"{'唐宋'[number % 2]}\n白日依山尽{number}\n黄河入海流\n欲穷千里目\n"
        (folder / f"{number:02d}.poem").write_text(text if number else "唐\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty series of two channels with captions, and a file that is none."""
    folder, rows = tmp_path_factory.mktemp("waves"), []
    for number in range(40):
        steps = STEPS - number % 7
        lines = [f"{(-1) ** number * step / steps:.3f},{number % 3}" for step in range(steps)]
        (folder / f"{number}.csv").write_text("\n".join(lines) + "\n")
        caption = f"{('rising', 'falling')[number % 2]} number {number}"
        rows.append({"file_name": f"{number}.csv", "caption": caption})
    (folder / "words.csv").write_text("a,b\n")
    rows.append({"file_name": "words.csv", "caption": "words"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


#: Inspects a folder with an option of the modality, prepares it with a value out of bounds, and
#: prepares. The options of a folder are those of the modalities that its process found first.
PREPARE = """
import sys
from pipelines import inspect, prepare
from pipelines.data.preprocessing import prepare as preparation
folder, *words = sys.argv[1:]
assert inspect.main([folder, "--options.folder.channels", "2", "--json"]) == 0
print("\\f")
wrong = ["--corpus", f"waves=folder:{folder}", "--options.waves.channels", "65"]
assert prepare.main(wrong) == 2
preparation.needs_no_ray = lambda corpora, store: True  # as where Ray is not installed
sys.exit(prepare.main(words))
"""


@pytest.fixture(scope="module")
def data(
    installed: Path, poems: Path, waves: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Both corpora, prepared in one run by processes that find the packages by their path."""
    folder = tmp_path_factory.mktemp("data")
    words = ["--corpus", f"poems={poems}", "--options.poems.verses", "2"]
    words += ["--corpus", f"waves=folder:{waves}", "--options.waves.channels", "2"]
    words += ["--data", str(folder), "--cpus", "1", "--json"]
    path = os.pathsep.join(map(str, (installed, ROOT, ROOT / "platform")))
    done = run_python("-c", PREPARE, waves, *words, cwd=ROOT, variables={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    report, made = map(json.loads, done.stdout.split("\f"))
    assert (report["modality"], report["task"]) == ("series", "text_to_series")
    assert not report["unread"]
    assert "channels" in done.stderr
    counts = {name: each["rows_in"] for name, each in made["corpora"].items()}
    assert counts == {"poems": 30, "waves": 41}
    return folder


@pytest.fixture
def series(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The packages in this process."""
    monkeypatch.syspath_prepend(installed)
    forget_entries()
    yield
    sys.modules.pop("time_series", None)
    forget_entries()


def test_a_format_is_prepared_by_its_name(data: Path) -> None:
    corpus = open_corpus(data / "poems", verify=True)
    assert corpus.task == "text_classification"
    assert corpus.manifest["rows_out"] == 29
    assert corpus.manifest["labels"] == ["唐", "宋"]
    assert corpus.manifest["quarantine"] == {"a poem without a dynasty or verses": 1}
    assert all(t.count("，") == 1 for t in corpus.splits["train"].column("text").to_pylist())


@pytest.mark.usefixtures("series")
def test_a_format_is_guessed_and_its_options_are_checked(
    poems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect.main([str(poems), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reader"] == "poems"
    assert prepare.main(["--corpus", f"poems={poems}", "--options.poems.verse", "2"]) == 2
    assert "did you mean 'verses'" in capsys.readouterr().err


@pytest.mark.usefixtures("series", "run_root")
def test_a_modality_goes_from_files_to_predictions(
    data: Path, waves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = open_corpus(data / "waves", verify=True)
    assert (corpus.task, corpus.manifest["quarantine"]) == (
        "text_to_series",
        {"not a table of numbers": 1},
    )
    written = describe_task(str(data / "waves"), None, "waves.yaml").settings["model"]
    assert written["inputs"] == {"series": {"channels": 2}}
    assert written["skills"] == [*DEFAULT_SKILLS, "series"]
    tasks = {name: known_tasks()[name] for name in ("text_to_series", "masked_series")}
    config = small_config(data, steps=4)
    config.model = replace(
        config.model,
        vocab_size=corpus.manifest["tokenizer"]["vocab_size"],
        skills=("general", "text", "alignment", "series"),
        tasks=tasks,
        inputs={"series": {"channels": 2, "steps": STEPS}},
    )
    config.tasks = {
        "text_to_series": TaskTraining("waves", batch_size=8),
        "masked_series": TaskTraining("waves", batch_size=8, split="pretraining"),
    }
    other = replace(config, model=replace(config.model, inputs={}))
    with pytest.raises(UserError, match=r"channels 2, .* Set model\.inputs\.series\.channels 2"):
        build_dataloader(other, ResolvedRun(other).corpora)
    batch = build_example_batch(config, "text_to_series", 2, 2)
    assert batch.towers["candidate"]["values"].shape == (2, STEPS, 2)
    model = train_model(ResolvedRun(config)).model
    assert model.flops("text_to_series")[1] == config.model.max_tokens + STEPS // 4
    rows = evaluate_model(model, data, corpora=dict.fromkeys(tasks, "waves"), splits=["test"])
    assert {row["task"] for row in rows} == set(tasks)

    run = tmp_path / "run"
    model.save_pretrained(run / "model")
    corpora = {name: {"corpus": "waves"} for name in tasks}
    (run / "config.yaml").write_text(yaml.safe_dump({"training": {}, "tasks": corpora}))
    folder = bundle.build_bundle(model_source.resolve_model(str(run)), data, tmp_path / "bundle")

    # Python, the command line and HTTP read a file as the training did.
    file = waves / "0.csv"
    table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    again = SkillNet.from_pretrained(folder)
    vectors = again.encode_inputs("series", [str(file), file.read_bytes(), table]).numpy()
    assert (vectors == vectors[0]).all()
    with pytest.raises(ValueError, match=r"input 0: a table of \(3, 1\), expected \(steps, 2\)"):
        again.encode_inputs("series", [np.zeros((3, 1))])
    capsys.readouterr()
    assert predict.main([str(file), "--model", str(folder), "--json", "--embeddings", "true"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(answer["embedding"], vectors[0], rtol=1e-5)
    assert predict.main([str(waves / "words.csv"), "--model", str(folder)]) == 2
    assert "words.csv: not a table of numbers" in capsys.readouterr().err
    sent = base64.b64encode(file.read_bytes()).decode()
    served = ServedModel(ServeConfig(str(run), str(data)))
    served.open_indexes()
    with run_service(served, LIMITS) as service:
        status, body, _ = service.ask("/v1/predict", {"rows": [{"file": sent, "name": "a.csv"}]})
        assert status == 200
        (found,) = json.loads(body)["predictions"]
        assert found["answer"] == answer["answer"]
        status, body, _ = service.ask("/v1/search", {"file": sent, "name": "a.csv"})
        assert status == 200, body

    # Words find files and a file finds words; the page draws files as pictures.
    page = tmp_path / "page.html"
    for query, given in ((["rising"], None), ([], str(file))):
        where = SearchConfig(query, given, None, str(run), str(data), ["test"], html=str(page))
        hits = search_corpus(where).hits
        pictures = page.read_text().count('<img src="data:image/png')
        assert pictures == len(hits) + (given is not None)
    done = export_bundle(
        folder, bundle.check_bundle(folder), tmp_path / "graph", "pt2", "text_to_series"
    )
    assert done.difference < 1e-5


@pytest.mark.usefixtures("series")
def test_what_a_modality_does_not_have_is_named() -> None:
    tasks = {"masked_series": known_tasks()["masked_series"]}
    sizes = {"skills": ("general", "series"), "tasks": tasks}
    with pytest.raises(ValueError, match=r"model\.inputs\.series: unknown option 'step'; did you"):
        SkillNetConfig(**sizes, inputs={"series": {"step": 3}})
    with pytest.raises(ValueError, match=r"model\.inputs\.text: unknown option 'a'; it has none"):
        SkillNetConfig(inputs={"text": {"a": 3}})
    with pytest.raises(ValueError, match="no library's encoder reads series"):
        build_system("specialist", SkillNetConfig(**sizes))
