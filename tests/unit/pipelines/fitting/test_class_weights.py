"""Class weights: factors of the rows' losses, by their labels."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipelines.fitting import TrainingData
from skillnet.model import SkillNet
from skillnet_platform.errors import UserError

SIZES = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16, "embedding_dim": 8}


def make_rows(kinds: dict[str, int], split: str = "") -> list[dict[str, Any]]:
    return [
        {"text": f"{label}{number}{split}", "label": label}
        for label, count in kinds.items()
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    kinds = {"bird": 30, "fish": 6, "tree": 12}
    rows = {split: make_rows(kinds, split) for split in ("train", "validation", "test")}
    folder = tmp_path_factory.mktemp("weights")
    return TrainingData({"kind": rows}, folder, vocabulary=300)


def read_weights(data: TrainingData, setting: Any, steps: int = 6) -> dict[str, float]:
    """Return the factor of each label in the batches of an epoch."""
    model = SkillNet(data.config(**SIZES))
    settings = {"training.steps": steps, "tasks.kind.batch_size": 8}
    names = data.prepared["kind"].manifest["labels"]
    found = Counter[tuple[str, float]]()
    for batch in data.batches(model, settings | {"tasks.kind.class_weights": setting}):
        pairs = zip(batch.targets["labels"], batch.targets["weights"], strict=True)
        found.update((names[label], round(float(weight), 5)) for label, weight in pairs)
    assert len(found) == len(names)
    return dict(found.keys())


def test_balanced_labels_have_equal_shares_of_the_loss(data: TrainingData) -> None:
    weights = read_weights(data, "balanced")
    rows = data.prepared["kind"].splits["train"].rows
    assert rows == 48
    expected = {"bird": 48 / (3 * 30), "fish": 48 / (3 * 6), "tree": 48 / (3 * 12)}
    assert weights == pytest.approx(expected, abs=1e-4)


def test_a_label_that_is_left_out_counts_once(data: TrainingData) -> None:
    assert read_weights(data, {"fish": 4.0}) == {"bird": 1.0, "fish": 4.0, "tree": 1.0}


def test_the_loss_is_the_weighted_sum_over_the_rows(data: TrainingData) -> None:
    model = SkillNet(data.config(**SIZES)).eval()
    setting = {"training.steps": 1, "tasks.kind.class_weights": {"fish": 4.0, "tree": 0.5}}
    (batch,) = data.batches(model, setting)
    outputs = model("kind", batch.towers)
    names = data.prepared["kind"].manifest["labels"]
    factors = torch.tensor([{"fish": 4.0, "tree": 0.5}.get(name, 1.0) for name in names])
    labels = batch.targets["labels"]
    losses = F.cross_entropy(outputs["logits"], labels, reduction="none")
    expected = (losses * factors[labels]).sum() / len(labels)
    assert torch.allclose(data.compute_loss(model, batch, outputs), expected)
    assert not torch.allclose(expected, losses.mean())


def test_a_wrong_label_or_objective_is_named(data: TrainingData, tmp_path: Path) -> None:
    model = SkillNet(data.config(**SIZES))
    with pytest.raises(UserError, match=r"tasks.kind.class_weights: unknown label 'fisch'.*fish"):
        next(data.batches(model, {"tasks.kind.class_weights": {"fisch": 2.0}}))
    numbers = {
        split: [{"text": f"{split}{n}", "number": n / 7} for n in range(20)]
        for split in ("train", "validation", "test")
    }
    options = {"size": {"label": "number", "task": "values"}}
    other = TrainingData({"size": numbers}, tmp_path, options=options, vocabulary=300)
    model = SkillNet(other.config(**SIZES))
    with pytest.raises(UserError, match=r"tasks.size.class_weights: the loss of regression"):
        next(other.batches(model, {"tasks.size.class_weights": "balanced"}))
