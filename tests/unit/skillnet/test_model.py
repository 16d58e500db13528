"""Complete model: independence of rows, parameters of a task, golden losses."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skillnet import SkillNet, SkillPlan
from skillnet.modality import modality_names
from tests.helpers.small_models import (
    PLANS,
    batch_of,
    loss_of,
    small_config,
    small_model,
    towers_of,
)

TASKS = tuple(small_config().tasks)
GOLDEN = Path(__file__).parents[2] / "golden" / "losses.json"


# -- a row's result is its own ----------------------------------


def _rows(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


def _shortened(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row, padded only to its own length."""
    one = _rows(batch, slice(row, row + 1))
    if "tokens" in one:
        return {"tokens": one["tokens"][:, : int((one["tokens"] != 0).sum())]}
    if "log_mel" in one:
        return {**one, "log_mel": one["log_mel"][:, : int(one["frames"])]}
    return one


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("modality", modality_names())
def test_neither_padding_nor_neighbours_change_a_row(modality: str, training: bool) -> None:
    model = small_model().train(training)
    batch = batch_of(modality, model.config, rows=5)
    together = model.encode(batch, PLANS[modality])
    for row in range(5):
        alone = model.encode(_shortened(batch, row), PLANS[modality])[0]
        torch.testing.assert_close(alone, together[row], rtol=1e-12, atol=1e-12)


def test_what_stands_in_the_padding_of_sound_does_not_matter() -> None:
    model = small_model()
    batch = batch_of("sound", model.config, rows=4)
    other = {**batch, "log_mel": batch["log_mel"].clone()}
    for row, frames in enumerate(batch["frames"].tolist()):
        other["log_mel"][row, frames:] = 1e3
    assert torch.equal(model.encode(batch, PLANS["sound"]), model.encode(other, PLANS["sound"]))


def test_ctc_lengths_follow_the_frames() -> None:
    model = small_model()
    outputs = model("speech_recognition", towers_of("speech_recognition", model.config, 6))
    frames = towers_of("speech_recognition", model.config, 6)["input"]["frames"]
    assert outputs["lengths"].tolist() == [-(-int(n) // model.config.mel_stack) for n in frames]
    assert outputs["log_probs"].shape[1] == int(outputs["lengths"].max())


def test_a_row_without_a_token_is_finite() -> None:
    model = small_model()
    tokens = torch.tensor([[5, 6, 7], [0, 0, 0]])
    pooled = model.encode({"tokens": tokens}, PLANS["text"])
    assert torch.equal(pooled[1], torch.zeros_like(pooled[1]))
    pooled.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_pixels_may_be_bytes_or_fractions() -> None:
    model = small_model()
    for modality, key in (("image", "pixels"), ("video", "frames")):
        batch = batch_of(modality, model.config)
        fractions = {key: batch[key].double() / 255}
        torch.testing.assert_close(
            model.encode(batch, PLANS[modality]), model.encode(fractions, PLANS[modality])
        )


# -- plans ----------------------------------


def test_a_plan_changes_the_result_and_its_order_does_not() -> None:
    model = small_model()
    batch = batch_of("text", model.config)
    one = model.encode(batch, SkillPlan(("general", "text")))
    assert torch.equal(one, model.encode(batch, SkillPlan(("text", "general"))))
    assert not torch.allclose(one, model.encode(batch, SkillPlan(("general", "code"))))
    assert not torch.allclose(one, model.encode(batch, SkillPlan(("general", "text"), "code")))


def test_an_unknown_skill_or_task_is_named_with_the_nearest() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="did you mean 'general'"):
        model.encode(batch_of("text", model.config), SkillPlan(("generel",)))
    with pytest.raises(ValueError, match="did you mean 'text_to_code'"):
        model("text_to_cod", {})
    with pytest.raises(ValueError, match="no retrieval space"):
        model.embed("text_classification", "query", batch_of("text", model.config))


@pytest.mark.parametrize("name", ["keys", "training", "forward"])
def test_task_and_skill_names_that_torch_needs_are_refused(name: str) -> None:
    config = small_config()
    with pytest.raises(ValueError, match=f"task name '{name}' is taken"):
        SkillNet(small_config(tasks={**config.tasks, name: config.tasks["text_to_code"]}))
    with pytest.raises(ValueError, match=f"skill name '{name}' is taken"):
        SkillNet(small_config(skills=(*config.skills, name)))


@pytest.mark.parametrize(
    ("modality", "batch", "message"),
    [
        ("text", {"tokens": torch.ones(1, 13, dtype=torch.int64)}, "13 tokens .*max_tokens 12"),
        ("image", {"pixels": torch.zeros(1, 4, 8, 3)}, "4x8x3, the model reads 8x8x3"),
        ("video", {"frames": torch.zeros(1, 3, 8, 8, 1)}, "3 frames of 8x8x1, .* 4 frames of 8x8"),
        (
            "sound",
            {"log_mel": torch.zeros(1, 21, 6), "frames": torch.tensor([21])},
            "21 frames .*max_frames 20",
        ),
    ],
)
def test_inputs_of_the_wrong_size_are_named(modality: str, batch: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model().encode(batch, PLANS[modality])


# -- outputs ----------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_of_every_task(task: str, autocast: bool) -> None:
    model = small_model(torch.float32)
    towers = towers_of(task, model.config)
    if "log_mel" in towers.get("input", {}):
        towers["input"]["log_mel"] = towers["input"]["log_mel"].float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = model(task, towers)
    if task == "text_classification":
        assert outputs["logits"].shape == (3, 5)
    elif task == "speech_recognition":
        assert outputs["log_probs"].dtype == torch.float32
        torch.testing.assert_close(outputs["log_probs"].exp().sum(-1), torch.ones(3, 6))
    else:
        for tower in ("query", "candidate"):
            assert outputs[tower].shape == (3, 6)
            torch.testing.assert_close(outputs[tower].norm(dim=1), torch.ones(3))
        assert 0 < outputs["scale"] <= 100


def test_the_scale_of_similarities_is_bounded() -> None:
    head = small_model().heads["text_to_image"]
    with torch.no_grad():
        head.log_scale.fill_(9.0)
    assert head.scale == 100


# -- ownership ----------------------------------


@pytest.mark.parametrize("modules", ["both", "attention", "feedforward"])
@pytest.mark.parametrize("task", TASKS)
def test_active_parameters_are_those_that_a_backward_pass_touches(task: str, modules: str) -> None:
    model = small_model(skill_modules=modules, skill_every=2)
    loss_of(model, task).backward()
    touched = [name for name, p in model.named_parameters() if p.grad is not None]
    assert [name for name, _ in model.active_parameters(task)] == touched
    for name, parameter in model.active_parameters(task):
        assert parameter.grad.abs().sum() > 0 or "norm.bias" in name, name


def test_every_parameter_belongs_to_one_file() -> None:
    model = small_model(skill_every=2)
    files = model.files_of()
    owned = [name for names in files.values() for name in names]
    assert sorted(owned) == sorted(name for name, _ in model.named_parameters())
    assert len(set(owned)) == len(owned)
    assert set(files) == {
        "shared",
        *(f"skill-{name}" for name in model.config.skills),
        *(f"stem-{name}" for name in ("token", "patch", "tubelet", "log_mel")),
        *(f"head-{name}" for name in TASKS),
    }
    of_task = model.files_of("text_to_video")
    assert set(of_task) == {
        "shared",
        "skill-general",
        "skill-text",
        "skill-video",
        "skill-alignment",
        "stem-token",
        "stem-tubelet",
        "head-text_to_video",
    }
    assert all(of_task[file] == files[file] for file in of_task)


def test_skills_may_be_called_as_modules_are() -> None:
    names = ("weights", "norm", "attention", "general", "encoder", "stems")
    tasks = {"text_to_code": small_config().tasks["text_to_code"]}
    skills = ("text", "code", "alignment", *names)
    model = small_model(skills=skills, tasks=tasks, skill_every=2)
    files = model.files_of()
    sizes = {len(files[f"skill-{name}"]) for name in skills}
    assert len(sizes) == 1


# -- golden losses ----------------------------------


def _fill(model: SkillNet) -> None:
    """Weights that follow from names alone, not from torch's random numbers."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            phase = zlib.crc32(name.encode()) % 1000
            waves = torch.sin(torch.arange(p.numel(), dtype=p.dtype) * 1.7 + phase).view_as(p)
            p.copy_(waves * 0.1 + (1 if name.endswith("norm.weight") else 0))


def _waves(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if "log_mel" not in batch:
        return batch
    shape = batch["log_mel"].shape
    waves = torch.sin(torch.arange(batch["log_mel"].numel(), dtype=torch.float64)).view(shape)
    return {**batch, "log_mel": waves}


def _train(task: str) -> list[float]:
    model = small_model(skill_every=1)
    _fill(model)
    named = list(model.active_parameters(task))
    optimizer = torch.optim.AdamW([p for _, p in named], lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(4):
        towers = towers_of(task, model.config, rows=4)
        outputs = model(task, {name: _waves(batch) for name, batch in towers.items()})
        if "logits" in outputs:
            loss = outputs["logits"].logsumexp(1).mean() - outputs["logits"][:, 1].mean()
        elif "log_probs" in outputs:
            loss = -outputs["log_probs"][:, :3, 1:4].mean()
        else:
            similarity = outputs["scale"] * outputs["query"] @ outputs["candidate"].T
            loss = similarity.logsumexp(1).mean() - similarity.diagonal().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_golden_losses() -> None:
    """A change without numerical effect leaves these losses unchanged.

    Otherwise write them again, and state why in the commit:
    ``SKILLNET_WRITE_GOLDEN=1 pytest tests/unit/skillnet/test_model.py``.
    """
    losses = {task: _train(task) for task in TASKS}
    if os.environ.get("SKILLNET_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert losses.keys() == golden.keys()
    for task, values in losses.items():
        assert values == pytest.approx(golden[task], rel=1e-9), task
        assert values[-1] < values[0], task
