"""``skillnet quickstart`` from prepared corpora to a registered model, in one process."""

import json
from pathlib import Path

import pytest

from pipelines import quickstart, verify
from skillnet_platform.cluster import connect
from skillnet_platform.tracking import backend
from skillnet_serving import search
from tests.helpers.readable_corpora import write_corpora
from tests.helpers.small_run import SMALL_RUN, option_arguments

pytestmark = pytest.mark.integration

SMALL = {
    **SMALL_RUN,
    "training.steps": 16,
    "training.log_every": 4,
    "skip": "[fetch,prepare]",
    "tasks.text_to_definition.batch_size": 8,
}


def words(data: Path, **more: object) -> list[str]:
    given = {**SMALL, "data": data, **more}
    return option_arguments(given)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("root")
        patch.setenv("SKILLNET_HOME", str(root))
        write_corpora(root / "corpora")
        yield root


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory):
    """One run by ``--json``; its document and what it said beside it."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        # Of all stages only prepare, which is skipped here, starts Ray.
        patch.setattr(connect, "ensure_ray", None)
        code = quickstart.main([*words(place / "corpora", name="first"), "--json"])
    assert code == 0, err.getvalue()
    return json.loads(out.getvalue()), err.getvalue()


def test_the_document_tells_everything(done, place: Path):
    document, _ = done
    assert document["steps"] == 16
    assert document["model"] == "models:/skillnet/1"
    assert document["alias"] == "champion"
    assert set(document["stages"]) == {"simple_baselines", "train", "register"}
    tasks = {row["task"] for row in document["evaluation"]}
    assert len(tasks) == 5
    assert {row["system"] for row in document["simple_baselines"]} == {"chance", "simple_baseline"}
    assert {row["task"] for row in document["simple_baselines"]} == tasks
    assert all(row["steps"] == 16 for row in document["evaluation"])
    assert (place / "first" / "model" / "manifest.json").is_file()


def test_stages_are_numbered_and_timed(done):
    _, said = done
    for number, name in enumerate(["simple_baselines", "train", "register"], 1):
        assert f"[{number}/3] {name}: " in said


def test_the_run_is_recorded_with_the_simple_baselines(done):
    document, _ = done
    run = backend.create_client(backend.resolve_uri()).get_run(document["run_id"])
    assert run.info.status == "FINISHED"
    note = run.data.tags["mlflow.note.content"]
    assert "simple baseline" in note
    assert "| text_to_image |" in note
    row = next(r for r in document["simple_baselines"] if r["system"] == "simple_baseline")
    assert f"{100 * row['value']:.1f} %" in note
    assert run.data.metrics["text_to_code/test_recall_at_10"] >= 0


def test_its_model_searches_and_verifies(done, place: Path):
    found = search.search_corpus(
        search.SearchConfig(["红色的方块"], data=str(place / "corpora"), top=3)
    )
    assert len(found.hits) == 3
    checks = verify.verify(verify.VerifyConfig(data=str(place / "corpora")))
    assert {check.state for check in checks} == {"ok"}
    assert {"run", "run's model"} <= {check.subject for check in checks}


def test_the_table_for_people(done, place: Path, capsys):
    capsys.readouterr()
    assert quickstart.main(words(place / "corpora", name="first")) == 0
    printed = capsys.readouterr()
    for name in ("chance", "simple baseline", "SkillNet", "active", "text_to_video"):
        assert name in printed.out
    assert 'skillnet search "红色的心"' in printed.err
    versions = backend.create_client(backend.resolve_uri()).search_model_versions("name='skillnet'")
    assert len(versions) == 1, "a finished run is registered once"


def test_a_wrong_key_is_named(capsys):
    assert quickstart.main(["--training.step", "3"]) == 2
    assert "did you mean 'training.steps'" in capsys.readouterr().err


def test_missing_archives_are_named(tmp_path: Path, run_root, capsys, monkeypatch):
    # What pip and npm say without an index: plugins/corpora/tests/test_fetch.py.
    monkeypatch.setattr("skillnet_corpora.fetch._download_one", lambda *_: "no index answers")
    task = {"tasks.text_classification": "null", "tasks.speech_recognition": "null"}
    given = {**task, "tasks.text_to_image": "null", "tasks.text_to_video": "null"}
    line = [part for key, value in given.items() for part in (f"--{key}", value)]
    assert quickstart.main(line) == 2
    assert "pip download" in capsys.readouterr().err
