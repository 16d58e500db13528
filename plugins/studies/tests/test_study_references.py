"""The command that measures the simple references of a kept study."""

from pathlib import Path
from statistics import fmean

import pytest

from pipelines.data.config.folds import FoldConfig
from pipelines.training.evaluation.simple_baselines import evaluate_simple_baselines
from pipelines.training.runs.layout import RESULT
from plugins.studies.tests.kept_studies import keep_study
from skillnet_evidence.comparison import MEAN
from skillnet_platform.storage import read_json, write_json
from skillnet_studies.analysis.finished_runs import read_corpus_digests
from skillnet_studies.config.study import REFERENCES_FILE
from skillnet_studies.report.references import collect_reference_scores
from skillnet_studies.study.kept_results import KeptStudy, change_kept, write_document
from tests.helpers import readable_corpora
from tests.helpers.small_corpora import MODALITY
from tools.docs.study_references import main


def write_kept_study(root: Path) -> Path:
    """Write corpora with texts, and a kept study whose runs have their digests."""
    data = readable_corpora.write_corpora(root / "corpora")
    study = keep_study(root, "final", {"skillnet": 0.5})
    tasks = {task: {"corpus": corpus} for corpus, (_, task) in MODALITY.items()}
    digests = read_corpus_digests({"data": str(data), "tasks": tasks})
    assert len(digests) == 5
    with change_kept(study) as kept:
        for run in kept.runs.values():
            run[RESULT]["corpora"] = digests
    return study


def test_references_are_the_means_over_the_folds(tmp_path: Path) -> None:
    study = write_kept_study(tmp_path)
    assert main([str(study), "--data", str(tmp_path / "corpora")]) == 0
    content = KeptStudy(study).content[REFERENCES_FILE]
    scores = {row["task"]: row["score"] for row in content["scores"] if row["split"] == "test"}
    assert {task for _, task in MODALITY.values()} < set(scores)
    by_fold = [
        collect_reference_scores(
            evaluate_simple_baselines(
                tmp_path / "corpora", bootstrap_samples=0, fold=FoldConfig(3, number)
            )
        )
        for number in range(3)
    ]
    for task, score in scores.items():
        if task != MEAN:
            assert score == pytest.approx(fmean(fold[task, "test"] for fold in by_fold))
    assert len({fold["text_classification", "test"] for fold in by_fold}) > 1


def test_without_the_corpora_of_the_study_nothing_is_written(tmp_path, capsys):
    study = write_kept_study(tmp_path)
    before = {"corpora": {}, "fold": {}, "scores": []}
    write_document(study, REFERENCES_FILE, before)
    with pytest.raises(SystemExit):
        main([str(study), "--data", str(tmp_path / "nowhere")])
    assert "lacks corpora of the study" in capsys.readouterr().err
    # One corpus has another version than the study.
    manifest = tmp_path / "corpora" / "headings" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"digest": "f" * 64})
    with pytest.raises(SystemExit):
        main([str(study), "--data", str(tmp_path / "corpora")])
    assert KeptStudy(study).content[REFERENCES_FILE] == before
