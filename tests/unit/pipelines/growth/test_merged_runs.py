"""The run of a merge: its name, its record in MLflow, and its registration."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config.merging import MergeConfig
from pipelines.merge import merge_trained_models
from pipelines.shards.format import manifest_digest
from skillnet.growth import add_task
from skillnet.model import SkillNet
from skillnet.skills import Task
from skillnet_platform.errors import UserError
from tests.helpers.readable_corpora import config, write_corpora
from tests.helpers.tracked_runs import where

pytestmark = pytest.mark.integration

HEADINGS = "text_classification"


@pytest.fixture
def place(run_root: Path) -> Path:
    """A run root with corpora, and models that grew from one base by one head each."""
    write_corpora(run_root / "corpora")
    torch.manual_seed(0)
    tasks = {HEADINGS: config().tasks[HEADINGS]}
    base = SkillNet(dataclasses.replace(config(), tasks=tasks))
    base.save_pretrained(run_root / "base")
    for name in ("one", "two", "three"):
        grown = copy.deepcopy(base)
        task = "second" if name == "three" else name
        add_task(grown, task, Task("classification", dict(tasks[HEADINGS].towers), 15))
        with torch.no_grad():
            for parameter in grown.heads[task].parameters():
                parameter.normal_()
        grown.save_pretrained(run_root / name)
    return run_root


def merge(place: Path, *models: str, **options: Any) -> dict[str, Any]:
    corpora = dict.fromkeys(("one", "two", "second", "other"), "headings")
    given = {"name": "both", "corpora": corpora, "tracking": where()} | options
    return merge_trained_models(MergeConfig([str(place / name) for name in models], **given))


def test_a_used_name_is_refused_for_another_merge(place: Path) -> None:
    first = merge(place, "one", "two")
    # The same merge, also of the same model at another address, is finished.
    shutil.copytree(place / "two", place / "copy")
    for again in (("one", "two"), ("one", "copy")):
        assert merge(place, *again)["seconds"] == first["seconds"]
    kept = {path: path.read_bytes() for path in (place / "both").rglob("[!.]*") if path.is_file()}
    changed = json.loads((place / "corpora/headings/manifest.json").read_text(encoding="utf-8"))
    changed["splits"]["test"] = changed["splits"]["validation"]
    changed["digest"] = manifest_digest(changed)
    moved = shutil.copytree(place / "corpora", place / "moved")
    (moved / "headings" / "manifest.json").write_text(json.dumps(changed), encoding="utf-8")
    for models, options, words in (
        (("one", "two"), {"rename": ["2:two=other"]}, "rename"),
        (("one", "two"), {"average_shared": True}, "average_shared"),
        (("one", "two"), {"without": ["sound"]}, "without"),
        (("one", "two"), {"data": str(moved)}, "corpora.headings"),
        (("one", "three"), {}, "models"),
        (("two", "one"), {}, "models"),
        (("one", "two", "three"), {}, "models"),
    ):
        with pytest.raises(UserError, match=rf"merge both has {words} .*--name"):
            merge(place, *models, **options)
    assert kept == {path: path.read_bytes() for path in kept}
    # A merge that was killed before its result continues if it is the same one.
    (place / "both" / "result.json").unlink()
    with pytest.raises(UserError, match="average_shared"):
        merge(place, "one", "two", average_shared=True)
    assert merge(place, "one", "two")["parents"] == first["parents"]
