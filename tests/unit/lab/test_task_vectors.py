"""TIES: task vectors are trimmed, agree on a sign, and are averaged."""

from pathlib import Path

import pytest
import torch

from lab.task_vectors import TiesJoin
from skillnet.model_merging import merge_models, plan_merge, read_parent
from skillnet.systems import load_model
from tests.helpers.small_models import small_model

#: Changes of five weights of two copies, and what TIES makes of them if each copy keeps three.
FIRST = [0.5, 0.4, -0.3, 0.2, 0.1]
SECOND = [0.6, -0.7, 0.05, 0.4, -0.1]
MERGED = [0.55, -0.7, -0.3, 0.4, 0.0]


def test_large_changes_of_the_elected_sign_are_averaged(tmp_path: Path) -> None:
    base = small_model(torch.float32)
    base.save_pretrained(tmp_path / "base")
    name = "stems.token.norm.weight"
    start = base.get_parameter(name).detach().clone()
    others = len(start) - 5
    for folder, change in (("one", FIRST), ("two", SECOND)):
        with torch.no_grad():
            base.get_parameter(name).copy_(start + torch.tensor([*change, *[0.0] * others]))
        base.save_pretrained(tmp_path / folder)
    parents = [read_parent(tmp_path / folder, folder) for folder in ("one", "two")]
    plan = plan_merge(parents, average_shared=True)
    (file,) = plan.averaged
    size = sum(value.numel() for value in parents[0].read_weights(file).values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lab.task_vectors.KEPT_FRACTION", 3 / size)
        ties = TiesJoin(read_parent(tmp_path / "base", "base"), plan)
    merge_models(plan, tmp_path / "merged", ties)
    merged = load_model(tmp_path / "merged")
    change = merged.get_parameter(name) - start
    assert change[:5].tolist() == pytest.approx(MERGED, abs=1e-6)
    assert not change[5:].any()
    # All other files are copies.
    assert read_parent(tmp_path / "merged", "").hashes | {file: ""} == parents[0].hashes | {
        file: ""
    }
