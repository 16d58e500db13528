"""Merging: the files of models that grew apart join, and the outputs stay equal to the bit.

Growth: new skills and tasks leave all existing weights bitwise unchanged.
"""

import copy
from pathlib import Path

import pytest
import torch

from skillnet.model import SkillNet
from skillnet.model_merging import (
    add_skill,
    add_task,
    merge_models,
    plan_merge,
    read_parent,
    remove_skill,
    remove_task,
)
from skillnet.serialization import read_manifest
from skillnet.skills import SkillPlan, Task
from skillnet.systems import load_model
from skillnet.vocabulary import ModelVocabulary
from tests.helpers.small_models import (
    PLANS,
    batch_of,
    loss_of,
    small_config,
    small_model,
    towers_of,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that grew from one base: ``one`` by ink, ``two`` by tone, ``clash`` by another ink."""
    root = tmp_path_factory.mktemp("models")
    base = small_model(torch.float32)
    base.vocabulary = ModelVocabulary("f" * 64)
    base.save_pretrained(root / "base")
    for number, (name, skill, task) in enumerate(
        [("one", "ink", "counting"), ("two", "tone", "tones"), ("clash", "ink", "tones")]
    ):
        grown = copy.deepcopy(base)
        torch.manual_seed(number)
        add_skill(grown, skill)
        towers = {"input": SkillPlan(("general", skill, "video"), "video")}
        add_task(grown, task, Task("classification", towers, 3))
        with torch.no_grad():
            for parameter in grown.heads[task].parameters():
                parameter.normal_()
        grown.save_pretrained(root / name)
    small_model(torch.float32, seed=1).save_pretrained(root / "other")
    small_model(torch.float32, ffn_dim=16).save_pretrained(root / "wide")
    return root


def join(folder: Path, target: Path, *names: str, **options: object) -> SkillNet:
    renames: dict[str, dict[str, str]] = options.pop("renames", {})  # type: ignore[assignment]
    parents = [read_parent(folder / name, name, renames.get(name)) for name in names]
    merge_models(plan_merge(parents, **options), target)  # type: ignore[arg-type]
    model = load_model(target)
    assert isinstance(model, SkillNet)
    return model


def clips(model: SkillNet) -> dict[str, dict[str, torch.Tensor]]:
    return {"input": batch_of("video", model.config)}


def test_every_output_of_every_parent_is_equal_to_the_bit(folder: Path, tmp_path: Path) -> None:
    merged = join(folder, tmp_path / "both", "one", "two")
    assert {"ink", "tone"} <= set(merged.config.skills)
    # One task can be downloaded alone.
    assert read_manifest(tmp_path / "both")["tasks"].keys() == merged.config.tasks.keys()
    assert merged.vocabulary.tokenizer == "f" * 64
    for name, task in (("one", "counting"), ("two", "tones")):
        parent = load_model(folder / name)
        expected, found = parent(task, clips(merged)), merged(task, clips(merged))
        assert torch.equal(expected["logits"], found["logits"])
        for old in load_model(folder / "base").config.tasks:
            batch = towers_of(old, merged.config)
            expected, found = parent(old, batch), merged(old, batch)
            assert all(torch.equal(expected[key], found[key]) for key in expected)
    parents = {**hashes(folder / "two"), **hashes(folder / "one")}
    assert hashes(tmp_path / "both") == parents


def hashes(folder: Path) -> dict[str, str]:
    return read_parent(folder, folder.name).hashes


def test_renamed_skills_and_tasks_keep_their_outputs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"skill-ink differs: one .* --rename ink=NEW"):
        join(folder, tmp_path / "both", "one", "clash")
    renames = {"clash": {"ink": "ink_two", "tones": "tones_two"}}
    merged = join(folder, tmp_path / "both", "one", "clash", renames=renames)
    assert merged.config.tasks["tones_two"].skills == ("general", "ink_two", "video")
    expected = load_model(folder / "clash")("tones", clips(merged))
    assert torch.equal(expected["logits"], merged("tones_two", clips(merged))["logits"])


@pytest.mark.parametrize(
    ("renames", "message"),
    [
        ({"ink": "a"}, "rename ink=a: clash adds the skills of tones in the order of their names"),
        ({"inc": "x"}, "clash has no skill or task 'inc'; did you mean 'ink'"),
        ({"ink": "video"}, "clash already has 'video'"),
    ],
)
def test_renames_that_would_change_outputs_are_rejected(
    folder: Path, renames: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_parent(folder / "clash", "clash", renames)


def test_a_skill_leaves_unless_a_task_needs_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the skill ink is needed by counting"):
        join(folder, tmp_path / "both", "one", "two", without=["ink"])
    with pytest.raises(ValueError, match="no model has a skill 'inc'; did you mean 'ink'"):
        join(folder, tmp_path / "both", "one", "two", without=["inc"])
    lone = load_model(folder / "base")
    assert isinstance(lone, SkillNet)
    add_skill(lone, "unused").save_pretrained(tmp_path / "lone")
    merged = join(tmp_path, tmp_path / "both", "lone", str(folder / "one"), without=["unused"])
    assert "unused" not in merged.config.skills
    assert not (tmp_path / "both" / "skill-unused.safetensors").exists()


def test_models_without_a_common_base_join_only_by_averages(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shared differs: .*the models have no common base"):
        join(folder, tmp_path / "both", "base", "other")
    with pytest.raises(ValueError, match=r"base has model\.ffn_dim 12, wide has 16"):
        join(folder, tmp_path / "both", "base", "wide")
    merged = join(folder, tmp_path / "both", "base", "other", average_shared=True)
    one, other = load_model(folder / "base"), load_model(folder / "other")
    for name, parameter in merged.named_parameters():
        mean = (one.get_parameter(name).double() + other.get_parameter(name).double()) / 2
        assert torch.equal(parameter, mean.float()), name
    # The mean of three is rounded once: float32 sums round after each addition.
    small_model(torch.float32, seed=2).save_pretrained(tmp_path / "third")
    names = ("base", "other", str(tmp_path / "third"))
    merged = join(folder, tmp_path / "three", *names, average_shared=True)
    parents = [load_model(folder / name) for name in names]
    for name, parameter in merged.named_parameters():
        values = [parent.get_parameter(name).double() for parent in parents]
        assert torch.equal(parameter, (sum(values) / 3).float()), name
    # A renamed task keeps its head.
    renames = {"other": {"text_to_code": "code_two"}}
    options = {"average_shared": True, "renames": renames}
    merged = join(folder, tmp_path / "two", "base", "other", **options)
    heads = [f"heads.{task}.query.weight" for task in ("code_two", "text_to_code")]
    assert torch.equal(merged.get_parameter(heads[0]), other.get_parameter(heads[1]))
    assert torch.equal(merged.get_parameter(heads[1]), one.get_parameter(heads[1]))


def test_a_task_of_two_scales_has_two_meanings(tmp_path: Path) -> None:
    """Its head predicts multiples of the deviation, so another scale gives other numbers."""
    plan = SkillPlan(("general", "text"), "text")
    model = add_task(small_model(torch.float32), "price", Task("regression", {"input": plan}))
    for name, scale in (("one", (5.0, 2.0)), ("two", (5.0, 3.0)), ("three", (6.0, 2.0))):
        model.vocabulary = ModelVocabulary("f" * 64, {}, {"price": scale})
        model.save_pretrained(tmp_path / name)
    for other in ("two", "three"):
        with pytest.raises(ValueError, match=rf"the task price of {other} has other plans"):
            join(tmp_path, tmp_path / "both", "one", other)
    renames = {"two": {"price": "price_two"}}
    merged = join(tmp_path, tmp_path / "both", "one", "two", renames=renames)
    assert merged.vocabulary.scales == {"price": (5.0, 2.0), "price_two": (5.0, 3.0)}
    assert join(tmp_path, tmp_path / "same", "one", "one").vocabulary.scales["price"] == (5.0, 2.0)


def test_a_damaged_parent_is_found_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    load_model(folder / "one").save_pretrained(tmp_path / "damaged")
    path = tmp_path / "damaged" / "skill-ink.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"skill-ink\.safetensors was altered or cut short"):
        join(tmp_path, tmp_path / "both", "damaged", str(folder / "two"))
    assert not (tmp_path / "both").exists()


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
    with pytest.raises(ValueError, match="the skill image is needed by text_to_image"):
        remove_skill(model, "image")
