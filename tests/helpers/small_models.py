"""Small models and made-up batches for tests of skillnet."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.serialization import write_manifest
from skillnet.skills import SkillPlan, Task, default_tasks

#: One plan per modality, with the skills of the default tasks.
PLANS = {
    "text": SkillPlan(("general", "text"), "text"),
    "code": SkillPlan(("general", "code", "alignment"), "code"),
    "sound": SkillPlan(("general", "sound"), "sound"),
    "image": SkillPlan(("general", "image", "alignment"), "image"),
    "video": SkillPlan(("general", "video", "alignment"), "video"),
}


def small_config(**changes: Any) -> SkillNetConfig:
    """A model of all five tasks with a few thousand parameters, without randomness in training."""
    tasks = default_tasks()
    tasks["text_classification"] = Task(
        "classification", tasks["text_classification"].towers, outputs=5
    )
    tasks["speech_recognition"] = Task("ctc", tasks["speech_recognition"].towers, outputs=7)
    values: dict[str, Any] = {
        "dim": 8,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 12,
        "drop_path": 0.0,
        "vocab_size": 40,
        "max_tokens": 12,
        "bigram_buckets": 16,
        "n_mels": 6,
        "mel_stack": 3,
        "max_frames": 20,
        "image_size": 8,
        "patch_size": 4,
        "video_frames": 4,
        "video_size": 8,
        "tubelet": (2, 4, 4),
        "embedding_dim": 6,
        "tasks": tasks,
    }
    return SkillNetConfig(**(values | changes))


def small_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> SkillNet:
    """A small model in ``dtype`` whose weights, norms and biases included, are all random."""
    torch.manual_seed(seed)
    model = SkillNet(small_config(**changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def reseal_model(folder: Path) -> Path:
    """Write a manifest of what is in a saved model now, as an attacker would."""
    write_manifest(folder, [p.name for p in folder.iterdir() if p.name != "manifest.json"])
    return folder


def batch_of(
    modality: str, config: SkillNetConfig, rows: int = 3, seed: int = 0
) -> dict[str, Tensor]:
    """A made-up batch of a modality; sequences differ in length, the first is the longest."""
    g = torch.Generator().manual_seed(seed)
    if modality in ("text", "code"):
        length = config.max_tokens - 3
        tokens = torch.randint(4, config.vocab_size, (rows, length), generator=g)
        keep = torch.randint(1, length + 1, (rows, 1), generator=g)
        keep[0] = length
        return {"tokens": tokens * (torch.arange(length) < keep)}
    if modality == "sound":
        longest = config.max_frames - 3
        frames = torch.randint(4, longest + 1, (rows,), generator=g)
        frames[0] = longest
        sound = torch.randn(rows, longest, config.n_mels, generator=g, dtype=torch.float64)
        return {"log_mel": sound, "frames": frames}
    if modality == "image":
        shape: tuple[int, ...] = (rows, config.image_size, config.image_size, 3)
        return {"pixels": torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)}
    shape = (rows, config.video_frames, config.video_size, config.video_size, 1)
    return {"frames": torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)}


def towers_of(
    task: str, config: SkillNetConfig, rows: int = 3, seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """Made-up batches for all towers of a task."""
    towers = config.tasks[task].towers
    return {
        tower: batch_of(plan.modality, config, rows, seed + index)
        for index, (tower, plan) in enumerate(sorted(towers.items()))
    }


def loss_of(model: SkillNet, task: str, rows: int = 3, seed: int = 0) -> Tensor:
    """Return a loss that depends on all outputs of a task."""
    outputs = model(task, towers_of(task, model.config, rows, seed))
    if "logits" in outputs:
        return outputs["logits"].logsumexp(1).mean()
    if "log_probs" in outputs:
        return (outputs["log_probs"][:, :2] * torch.arange(1, 9)).mean()
    similarity = outputs["scale"] * outputs["query"] @ outputs["candidate"].T
    return similarity.logsumexp(1).mean()


def drop_tokens(monkeypatch: pytest.MonkeyPatch, probability: float) -> None:
    """Let every SkillNet drop elements of its tokens, as layers of library encoders do."""
    tokens = SkillNet.tokens

    def tokens_with_dropout(self: SkillNet, *args: Any) -> Any:
        x_BTD, mask_BT = tokens(self, *args)
        return torch.nn.functional.dropout(x_BTD, probability, self.training), mask_BT

    monkeypatch.setattr(SkillNet, "tokens", tokens_with_dropout)
