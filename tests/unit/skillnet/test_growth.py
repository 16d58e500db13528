"""Growth: new skills and tasks leave all existing weights bitwise unchanged."""

from pathlib import Path

import pytest
import torch

from skillnet import SkillNet, SkillPlan
from skillnet.model_merging import add_skill, add_task, remove_skill, remove_task
from skillnet.skills import Task
from tests.helpers.small_models import PLANS, batch_of, loss_of, small_config, small_model


@pytest.mark.parametrize("init_from", [None, "image"])
@pytest.mark.parametrize("modules", ["both", "attention", "feedforward"])
def test_a_new_skill_leaves_the_rest_to_the_bit(modules: str, init_from: str | None) -> None:
    model = small_model(skill_modules=modules, skill_every=2, num_layers=4)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    batches = {m: batch_of(m, model.config) for m in PLANS}
    encoded = {m: model.encode(batches[m], plan) for m, plan in PLANS.items()}

    assert add_skill(model, "depth", init_from) is model

    assert model.config.skills[-1] == "depth"
    now = dict(model.named_parameters())
    for name, (parameter, value) in before.items():
        assert now[name] is parameter
        assert torch.equal(parameter, value)
    for modality, plan in PLANS.items():
        assert torch.equal(model.encode(batches[modality], plan), encoded[modality])
    new = set(now) - set(before)
    assert new == {n.replace(".image", ".depth") for n in before if n.endswith("weights.image")}
    assert {model.file_of(name) for name in new} == {"skill-depth"}


def test_a_skill_that_starts_as_a_copy_does_what_its_model_does() -> None:
    model = small_model()
    batch = batch_of("image", model.config)
    as_image = model.encode(batch, SkillPlan(("general", "image"), "image"))
    add_skill(model, "depth", init_from="image")
    as_depth = model.encode(batch, SkillPlan(("general", "depth"), "image"))
    torch.testing.assert_close(as_depth, as_image, rtol=1e-12, atol=1e-12)
    layer = model.encoder.layers[0].feedforward.up.weights
    with torch.no_grad():
        layer["depth"].add_(1)
    assert not torch.equal(layer["depth"], layer["image"])


def test_a_fresh_skill_is_drawn_as_the_others_were() -> None:
    model = SkillNet(small_config(dim=32, ffn_dim=64, num_heads=4))
    add_skill(model, "depth")
    for layer in model.encoder.layers:
        for weights in (layer.attention.qkv.weight, layer.feedforward.down):
            *others, new = (float(w.detach().std()) for w in weights.weights.values())
            assert new == pytest.approx(sum(others) / len(others), rel=0.1)


def test_a_new_skill_has_the_models_type_and_learns() -> None:
    model = add_skill(small_model(torch.float64), "depth")
    plan = SkillPlan(("general", "depth"), "image")
    model.encode(batch_of("image", model.config), plan).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float64
        if name.endswith(".depth"):
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


def test_a_grown_model_is_saved_with_the_old_files_unchanged(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "before")
    add_skill(model, "depth", "image").save_pretrained(tmp_path / "after")
    files = {path.name for path in (tmp_path / "after").iterdir()}
    assert files - {p.name for p in (tmp_path / "before").iterdir()} == {"skill-depth.safetensors"}
    for path in (tmp_path / "before").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()
    back = SkillNet.from_pretrained(tmp_path / "after")
    assert back.config == model.config


def test_merged_weights_kept_before_growth_stay_right() -> None:
    model = small_model().eval()
    batch = batch_of("text", model.config)
    with torch.no_grad():
        before = model.encode(batch, PLANS["text"])
        add_skill(model, "depth")
        assert torch.equal(model.encode(batch, PLANS["text"]), before)


@pytest.mark.parametrize(
    ("name", "init_from", "message"),
    [
        ("image", None, "already has a skill 'image'"),
        ("depth", "imgae", "unknown skill 'imgae'; did you mean 'image'"),
        ("shared", None, "choose another"),
        ("keys", None, "'keys' is taken"),
        ("training", None, "'training' is taken"),
        ("../x", None, "is not a name"),
        ("Image", None, "occurs twice"),
    ],
)
def test_skills_that_cannot_be_added_change_nothing(
    name: str, init_from: str | None, message: str
) -> None:
    model = small_model()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        add_skill(model, name, init_from)
    assert [name for name, _ in model.named_parameters()] == before
    assert model.config.skills == small_config().skills


def test_a_new_task_may_bring_a_new_modality() -> None:
    tasks = {"text_to_code": small_config().tasks["text_to_code"]}
    model = small_model(tasks=tasks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert set(model.stems) == {"token"}
    add_task(model, "naming", Task("classification", {"input": SkillPlan(("image",), "image")}, 3))
    assert set(model.stems) == {"token", "patch"}
    for name, p in model.named_parameters():
        assert p.dtype == torch.float64
        assert name not in before or torch.equal(p, before[name])
    loss_of(model, "naming").backward()
    loss_of(model, "text_to_code").backward()
    assert set(model.files_of("naming")) == {"shared", "skill-image", "stem-patch", "head-naming"}


@pytest.mark.parametrize(
    ("name", "skills", "message"),
    [
        ("text_to_code", ("text",), "already has a task"),
        ("a.b", ("text",), "is not a name"),
        ("keys", ("text",), "'keys' is taken"),
        ("naming", ("smell",), r"naming\.towers\.input: unknown skill 'smell'"),
    ],
)
def test_tasks_that_cannot_be_added_change_nothing(
    name: str, skills: tuple[str, ...], message: str
) -> None:
    model = small_model()
    with pytest.raises(ValueError, match=message):
        add_task(model, name, Task("classification", {"input": SkillPlan(skills)}, 3))
    assert model.config == small_config()
    assert set(model.heads) == set(small_config().tasks)


def test_a_task_taken_off_leaves_the_others_as_they_were() -> None:
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    remove_task(model, "text_to_code")
    after = dict(model.named_parameters())
    gone = {name for name in before if name.startswith("heads.text_to_code.")}
    assert gone
    assert after.keys() == before.keys() - gone
    assert all(torch.equal(p, before[name]) for name, p in after.items())
    assert "head-text_to_code" not in model.files_of()
    with pytest.raises(ValueError, match="unknown task 'text_to_code'"):
        remove_task(model, "text_to_code")


@pytest.mark.parametrize("modules", ["both", "feedforward"])
def test_a_removed_skill_leaves_the_rest_to_the_bit(modules: str, tmp_path: Path) -> None:
    model = add_skill(small_model(skill_modules=modules), "depth")
    batch = batch_of("image", model.config)
    with torch.no_grad():
        before = model.encode(batch, PLANS["image"])
        assert remove_skill(model, "depth") is model
        assert torch.equal(model.encode(batch, PLANS["image"]), before)
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "skill-depth.safetensors").exists()
    loaded = SkillNet.from_pretrained(tmp_path / "model")
    assert loaded.config.skills == small_model(skill_modules=modules).config.skills
    with pytest.raises(ValueError, match="unknown skill 'image'"):
        remove_skill(model, "image")
