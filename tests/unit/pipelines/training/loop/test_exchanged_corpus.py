"""A run is bound to the bytes of its corpora: it does not resume on an exchanged corpus."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from pipelines.training.loop.run import find_finished_result, open_run_folder
from pipelines.training.loop.setup import dry_run_init
from pipelines.training.runs.identity import find_identity_differences
from pipelines.training.runs.layout import CONFIG, RESULT
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.identity import check_unchanged
from sweeps.trials.trial import Trial
from tests.helpers.small_corpora import small_config, write_corpora


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_corpora(tmp_path / "data")


def exchange(data: Path) -> tuple[str, str]:
    """Replace the headings by others; return the digests before and after."""
    other = write_corpora(data.with_name("other"), rows=44)
    before = open_corpus(data / "headings").digest
    shutil.rmtree(data / "headings")
    shutil.copytree(other / "headings", data / "headings")
    return before, open_corpus(data / "headings").digest


def start(data: Path, run_root: Path, steps: int = 4) -> ResolvedRun:
    """Train the first steps of a run whose folder exists."""
    run = resolve_run(small_config(data, steps=steps, checkpoint_every=2))
    assert open_run_folder(run) is None
    train_model(run, stop_at=2)
    return run


def stored_config(run: ResolvedRun) -> FinetuneConfig:
    tree = configuration.load_yaml(run.folder / CONFIG)
    return configuration.build_config(FinetuneConfig, tree)


def test_a_run_does_not_resume_on_an_exchanged_corpus(data: Path, run_root: Path) -> None:
    run = start(data, run_root)
    before, after = exchange(data)
    message = (
        f"corpora.headings is {before} in .*{CONFIG}, and {after} below {re.escape(str(data))}"
    )
    with pytest.raises(UserError, match=message):
        find_finished_result(resolve_run(small_config(data, steps=4, checkpoint_every=2)))
    message = f"its digest is {after}, and corpora.headings is {before}"
    resumed = resolve_run(stored_config(run))
    with pytest.raises(UserError, match=message):
        train_model(resumed)


def test_a_checkpoint_does_not_load_on_an_exchanged_corpus(data: Path, run_root: Path) -> None:
    """Also without the stored configuration, as a caller of the library can."""
    run = start(data, run_root)
    exchange(data)
    unpinned = replace(run.config, corpora={})
    with pytest.raises(UserError, match="was written with another configuration"):
        train_model(ResolvedRun(unpinned, run.folder))


def test_a_new_run_on_the_new_corpus_takes_its_digest(data: Path, run_root: Path) -> None:
    run = start(data, run_root)
    _, after = exchange(data)
    config = replace(stored_config(run), name="second")
    config = replace(config, corpora=config.corpora | {"headings": None})
    second = resolve_run(config)
    assert second.config.corpora["headings"] == after
    assert second.corpora["headings"].digest == after


def test_a_finished_run_needs_no_corpus_but_rejects_another(data: Path, run_root: Path) -> None:
    run = start(data, run_root)
    result = {"step": 4, "seconds": 1.0, "model": "", "name": "test", "evaluation": []}
    (run.folder / RESULT).write_text(json.dumps(result))
    config = small_config(data, steps=4, checkpoint_every=2)
    assert find_finished_result(resolve_run(config)) == result
    exchange(data)
    with pytest.raises(UserError, match="was trained on another corpus"):
        find_finished_result(resolve_run(config))
    shutil.rmtree(data / "headings")
    assert find_finished_result(resolve_run(config)) == result


def test_the_stored_configuration_names_every_corpus(data: Path, run_root: Path) -> None:
    run = start(data, run_root)
    digests = {name: corpus.digest for name, corpus in run.corpora.items()}
    assert stored_config(run).corpora == digests
    assert len(digests) == 5


def test_a_run_records_the_corpora_of_its_initial_weights(data: Path, run_root: Path) -> None:
    first = start(data, run_root, steps=2)
    before = first.config.corpora
    exchange(data)
    config = replace(small_config(data), name="second", init_from=str(first.folder))
    second = resolve_run(config)
    report = dry_run_init(second.config)
    assert report.to_dict()["corpora"] == before
    assert second.config.corpora != before


def test_a_study_does_not_resume_on_an_exchanged_corpus(data: Path, run_root: Path) -> None:
    run = start(data, run_root)
    before, after = exchange(data)
    config = resolve_run(small_config(data, steps=4, checkpoint_every=2)).config
    study = StudyConfig(name="study", run_dir=str(run_root))
    with pytest.raises(UserError, match=f"corpora.headings {before}, not {after}"):
        check_unchanged(study, [Trial("test", config)], run.folder.parent)


def test_a_configuration_without_digests_differs_in_no_corpus(data: Path, run_root: Path) -> None:
    """A study compares its stored runs with a configuration that is not resolved."""
    run = start(data, run_root)
    unresolved = replace(run.config, corpora={})
    assert find_identity_differences(run.config, unresolved) == {}
    assert find_identity_differences(unresolved, run.config) == {}
