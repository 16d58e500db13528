"""Options of the layers: biases, post-norm, norms of stems and the class token."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.encoder import SHARED, EncoderLayer, Skills
from skillnet.modalities.pixels import PatchStem
from skillnet.model import SkillNet
from skillnet.model_merging import add_skill
from skillnet.skill_weights import SkillWeights
from skillnet.skills import SkillPlan, Task
from skillnet.systems import load_model
from tests.helpers.small_models import PLANS, batch_of, loss_of, small_config, small_model

ALL: dict[str, Any] = {"bias": True, "norm_position": "post"}
OPTIONS: list[dict[str, Any]] = [
    {"bias": True},
    {"norm_position": "post"},
    ALL | {"skill_every": 2, "norm_eps": 1e-3},
    ALL | {"skill_modules": "attention"},
]


def mean_of(part: SkillWeights, skills: Skills) -> Tensor:
    return torch.stack([part.weights[name] for name in skills]).mean(0)


def loop_layer(layer: EncoderLayer, x: Tensor, skills: Skills) -> Tensor:
    """Compute a layer with torch's own attention and one skill after the other."""
    attention, feedforward = layer.attention, layer.feedforward

    def attend(x: Tensor) -> Tensor:
        active = skills if layer.attention_skills else SHARED
        projections = []
        for part in (attention.qkv, attention.out):
            bias = 0 if part.bias is None else mean_of(part.bias, active)
            projections.append((mean_of(part.weight, active), bias))
        (weight, bias), (out, out_bias) = projections
        q, k, v = (
            y.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for y in (x @ weight.T + bias).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return y @ out.T + out_bias

    def feed(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        active = skills if layer.feedforward_skills else SHARED
        for name in active:
            h = x @ feedforward.up.weights[name].T
            if feedforward.up_bias is not None:
                h = h + feedforward.up_bias.weights[name]
            y = F.gelu(h) @ feedforward.down.weights[name].T
            if feedforward.down_bias is not None:
                y = y + feedforward.down_bias.weights[name]
            total = total + y / len(active)
        return total

    for branch, norm in ((attend, layer.attention_norm), (feed, layer.feedforward_norm)):
        x = norm(x + branch(x)) if layer.is_post_norm else x + branch(norm(x))
    return x


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_encoder_equals_the_loop_over_skills(options: dict[str, Any]) -> None:
    encoder = small_model(**options).encoder
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for skills in (("text",), ("alignment", "general", "text")):
        expected = x
        for layer in encoder.layers:
            assert isinstance(layer, EncoderLayer)
            expected = loop_layer(layer, expected, skills)
        assert isinstance(encoder.norm, nn.Identity) == (options.get("norm_position") == "post")
        expected = encoder.norm(expected)
        found = encoder(x, skills)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        probe = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
        parameters = list(encoder.parameters())
        ours, theirs = (
            torch.autograd.grad((y * probe).sum(), parameters, allow_unused=True)
            for y in (found, expected)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_defaults_have_the_parameters_of_a_model_without_options() -> None:
    names = {name for name, _ in SkillNet(small_config()).encoder.named_parameters()}
    assert not [name for name in names if "bias.weights" in name]
    assert "layers.0.attention_norm.weight" in names
    assert "norm.bias" in names


def test_biases_of_a_skill_are_in_its_file(tmp_path: Path) -> None:
    model = small_model(**ALL)
    files = model.files_of()
    layer = "encoder.layers.0"
    assert {
        f"{layer}.attention.qkv.bias.weights.text",
        f"{layer}.feedforward.up_bias.weights.text",
    } <= set(files["skill-text"])
    assert all(".text" in name for name in files["skill-text"])
    assert not [name for name in files["shared"] if "bias.weights" in name]
    model.save_pretrained(tmp_path)
    batch = batch_of("text", model.config)
    expected = model.eval().encode(batch, PLANS["text"])
    for found in (load_model(tmp_path), load_model(tmp_path, "text_classification")):
        assert isinstance(found, SkillNet)
        assert torch.equal(found.encode(batch, PLANS["text"]), expected)


def test_a_new_skill_gets_biases() -> None:
    model = small_model(**ALL)
    batch, text = batch_of("text", model.config), SkillPlan(("text",))
    before = model.encode(batch, text)
    add_skill(model, "depth", init_from="text")
    assert torch.equal(model.encode(batch, SkillPlan(("depth",))), before)
    assert torch.equal(model.encode(batch, text), before)


def test_inactive_skills_have_no_gradient() -> None:
    model = small_model(**ALL)
    loss_of(model, "text_classification").backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None}
    assert used == {name for name, _ in model.active_parameters("text_classification")}


def test_operations_do_not_change() -> None:
    plain, options = small_model(), small_model(**ALL)
    for task in plain.config.tasks:
        assert plain.flops(task) == options.flops(task)
        assert options.flops(task) == super(SkillNet, options).flops(task)  # torch's counter


def test_class_token_comes_first_and_has_no_position() -> None:
    model = small_model(class_token=True, stem_norm=False)
    batch = batch_of("image", model.config)
    stem = model.stems["patch"]
    assert isinstance(stem, PatchStem)
    assert stem.class_token is not None
    tokens, mask = stem(batch, "image")
    assert mask is None
    assert tokens.shape[1] == model.config.image_tokens == 5
    assert stem.norm(tokens) is tokens
    assert torch.equal(tokens[:, 0], stem.class_token.expand(3, 8))
    assert model.flops("text_to_image") == super(SkillNet, model).flops("text_to_image")


def test_masked_images_have_no_class_token() -> None:
    tasks = {"masked_image": Task("masked", {"input": SkillPlan(("image",), "image")})}
    with pytest.raises(ValueError, match=r"model\.class_token: masked_image predicts the patches"):
        small_config(class_token=True, tasks=tasks)
