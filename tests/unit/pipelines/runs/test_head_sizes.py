"""Outputs of a task equal the classes or symbols of its corpus, unless they are configured."""

import json
from pathlib import Path

import pytest

from pipelines.config.run import FinetuneConfig
from pipelines.shards.format import manifest_digest
from pipelines.training.resolved_run import resolve_run
from pipelines.training.run import validate_run
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import write_corpora


def has(folder: Path, corpus: str, **reported: object) -> None:
    """Add keys to the manifest of a prepared corpus."""
    path = folder / corpus / "manifest.json"
    manifest = json.loads(path.read_text()) | reported
    manifest["digest"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five corpora named as those of the paper; the audio corpus has 30 symbols."""
    folder = write_corpora(tmp_path / "corpora", rows=5, test_rows=5, shards=1)
    names = {"headings": "tnews", "syllables": "aishell1", "drawings": "aic_icc"}
    for old, new in (names | {"strokes": "vatex", "functions": "pytorrent"}).items():
        (folder / old).rename(folder / new)
    has(folder, "tnews", labels=[f"{number} news" for number in range(15)])
    symbols = "一二三四五六七八九十百千万亿东南西北中上下左右天地人日月水火"
    has(folder, "aishell1", symbols=list(symbols))
    return folder


def paper(data: Path, *words: str) -> FinetuneConfig:
    said = ["--config", "paper", "--data", str(data), "--training.use_gpu", "false", *words]
    return configuration.parse_config(FinetuneConfig, said, "skillnet finetune", "Train.")


def test_outputs_follow_the_corpora(data: Path, run_root: Path) -> None:
    run = resolve_run(paper(data))
    assert run.config.model.tasks["speech_recognition"].outputs == 30
    assert run.config.model.tasks["text_classification"].outputs == 15
    validate_run(run)
    assert set(run.manifests) == {"tnews", "aishell1", "aic_icc", "vatex", "pytorrent"}


def test_configured_outputs_are_not_changed(data: Path, run_root: Path) -> None:
    run = resolve_run(paper(data, "--model.tasks.speech_recognition.outputs", "40"))
    assert run.config.model.tasks["speech_recognition"].outputs == 40
    with pytest.raises(UserError, match="has 30 symbols, the model was built for 40"):
        validate_run(run)


def test_damaged_corpus_is_rejected_by_name_in_validation(data: Path, run_root: Path) -> None:
    (data / "aishell1" / "manifest.json").write_text("[")
    run = resolve_run(paper(data))
    assert run.config.model.tasks["speech_recognition"].outputs == 61
    with pytest.raises(UserError, match="aishell1"):
        validate_run(run)
