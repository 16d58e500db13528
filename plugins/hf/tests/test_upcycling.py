"""Upcycling: skills that start as copies compute what the dense encoder computed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plugins.hf.tests.tiny_checkpoints import save_checkpoint
from skillnet.config import SkillNetConfig
from skillnet.layers import SkillFeedForward
from skillnet.model import SkillNet
from skillnet.skill_copies import (
    DENSE_SKILL,
    copy_to_skills,
    find_inseparable_skills,
    is_unset_weight,
    separate_skills,
)
from skillnet.skills import SkillPlan
from skillnet.systems import build_system
from skillnet_hf.imported_weights import find_library_checkpoint, import_checkpoint
from skillnet_hf.library_checkpoint import convert_checkpoint, is_library_checkpoint
from skillnet_platform.errors import UserError
from tests.helpers.small_models import batch_of, small_config, small_model

#: Fields of the model section that a converted checkpoint sets.
LAYERS = ("dim", "num_layers", "num_heads", "ffn_dim", "bias", "norm_position", "norm_eps",
          "stem_norm", "class_token")  # fmt: skip


def library_tokens(name: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Encode a batch with the library's own code."""
    if name in ("bert", "roberta"):
        mask = batch["tokens"] != 0
        encoder = getattr(model, name, model)
        found: Tensor = encoder(batch["tokens"], attention_mask=mask.long()).last_hidden_state
        return found * mask[..., None]
    if name == "whisper":
        return model.get_encoder()(batch["log_mel"].transpose(1, 2)).last_hidden_state
    pixels = batch["pixels"].permute(0, 3, 1, 2).double() / 255
    if name == "vit":
        return model.vit((pixels - 0.5) / 0.5).last_hidden_state
    mean, std = (
        torch.tensor(model.pretrained_cfg[key], dtype=torch.float64)[:, None, None]
        for key in ("mean", "std")
    )
    return model.forward_features((pixels - mean) / std)


def our_tokens(model: SkillNet, batch: dict[str, Tensor], plan: SkillPlan) -> Tensor:
    tokens, mask = model.tokens(batch, plan)
    return tokens if mask is None else tokens * mask[..., None]


def batch_for(name: str, config: SkillNetConfig) -> tuple[str, dict[str, Tensor]]:
    if name == "whisper":  # it reads inputs of one length
        sound = torch.randn(3, 20, 6, dtype=torch.float64)
        return "sound", {"log_mel": sound, "frames": torch.tensor([20, 20, 20])}
    modality: Any = "text" if name in ("bert", "roberta") else "image"
    return modality, batch_of(modality, config)


@pytest.mark.parametrize("name", ["bert", "roberta", "vit", "timm", "whisper"])
@torch.no_grad()
def test_skills_copied_from_a_library_compute_its_outputs(name: str, tmp_path: Path) -> None:
    theirs = save_checkpoint(name, tmp_path)
    assert is_library_checkpoint(tmp_path)
    dense = convert_checkpoint(tmp_path)
    config = dense.config
    modality, batch = batch_for(name, config)
    expected = library_tokens(name, theirs, batch)
    found = our_tokens(dense, batch, SkillPlan((DENSE_SKILL,), modality))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    changes = {key: getattr(config, key) for key in LAYERS}
    changes |= {"max_tokens": 12, "bigram_buckets": 0, "mel_stack": config.mel_stack}
    ours = small_model(**changes).eval()
    weights = copy_to_skills(dict(dense.named_parameters()), ours)
    ours.load_partial(weights)
    for skills in (("text",), ("code", "general"), ("alignment", "general", "image", "sound"),
                   ("alignment", "general", "text")):  # fmt: skip
        found = our_tokens(ours, batch, SkillPlan(skills, modality))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"norm_position": "post", "bias": True}], ids=str)
@torch.no_grad()
def test_skills_copied_from_a_dense_model_compute_its_outputs(options: dict[str, Any]) -> None:
    config = small_config(**options)
    dense = build_system("dense", config, {"ffn_dim": config.ffn_dim}).double().eval()
    for parameter in dense.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    batch = batch_of("text", config)
    assert isinstance(dense, SkillNet)
    expected = our_tokens(dense, batch, SkillPlan((DENSE_SKILL,)))
    for modules, every in (("both", 1), ("attention", 1), ("feedforward", 2)):
        ours = small_model(**options, skill_modules=modules, skill_every=every).eval()
        fresh = ours.load_partial(copy_to_skills(dict(dense.named_parameters()), ours))
        assert fresh == []
        for skills in (("text",), ("code", "text"), ("code", "general", "image", "text")):
            found = our_tokens(ours, batch, SkillPlan(skills))
            # The mean of two or four equal matrices is the matrix, to the bit.
            assert torch.equal(found, expected)
        found = our_tokens(ours, batch, SkillPlan(("code", "general", "text")))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changed", ["up", "down", "up_bias", "down_bias"])
def test_copies_are_computed_once_in_inference_only(changed: str) -> None:
    layer = SkillFeedForward(("a", "b"), 4, 6, std=0.5, out_std=0.5, has_bias=True).eval()
    parts: dict[str, Any] = dict(layer.named_children())
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        for part in parts.values():
            part.weights["b"].copy_(part.weights["a"].normal_())
        alone = layer(x, layer.merge(x, ("a",)))
        assert torch.equal(layer(x, layer.merge(x, ("a", "b"))), alone)
        parts[changed].weights["b"].add_(0.5)
        mean = (alone + layer(x, layer.merge(x, ("b",)))) / 2
        torch.testing.assert_close(layer(x, layer.merge(x, ("a", "b"))), mean)
        assert not torch.equal(mean, alone)
        parts[changed].weights["b"].copy_(parts[changed].weights["a"])
    layer(x, layer.merge(x, ("a", "b"))).sum().backward()
    assert all(part.weights["b"].grad is not None for part in parts.values())


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-stable"])
@torch.no_grad()
def test_skills_copied_from_wav2vec2_compute_its_layers(name: str, tmp_path: Path) -> None:
    """Its stem reads waveforms, so only the layers and the norm of their input are converted."""
    theirs = save_checkpoint(name, tmp_path).wav2vec2.encoder
    x_BTD = torch.randn(3, 7, 12, dtype=torch.float64)
    expected = theirs.layer_norm(x_BTD) if name == "wav2vec2" else x_BTD
    for layer in theirs.layers:
        expected = layer(expected)
    if name == "wav2vec2-stable":
        expected = theirs.layer_norm(expected)
    dense = convert_checkpoint(tmp_path)
    changes = {key: getattr(dense.config, key) for key in LAYERS}
    ours = small_model(**changes).eval()
    weights = {
        key: value
        for key, value in dense.named_parameters()
        if not key.startswith("heads.") and not is_unset_weight(key, dense.config)
    }
    assert {key.split(".")[0] for key in weights} == (
        {"encoder", "stems"} if name == "wav2vec2" else {"encoder"}
    )
    ours.load_partial(copy_to_skills(weights, ours))
    for skills in (("text",), ("code", "general"), ("alignment", "general", "sound")):
        found = ours.encoder(ours.stems["log_mel"].norm(x_BTD), skills, None)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_weights_without_a_place_are_named_with_their_shapes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_checkpoint("bert", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    extra = {"bert.encoder.layer.0.adapter.weight": torch.ones(3, 4)}
    save_file(tensors | extra, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no place for the weights encoder\.layer\.0\.adapter"):
        convert_checkpoint(tmp_path)
    save_checkpoint("wav2vec2-stable", tmp_path / "waves")
    extra = {"wav2vec2.encoder.layers.0.adapter_layer.norm.weight": torch.ones(3)}
    waves = tmp_path / "waves" / "model.safetensors"
    save_file(load_file(waves) | extra, waves, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no place for the weights layers\.0\.adapter_layer"):
        convert_checkpoint(tmp_path / "waves")
    lacking = {k: v for k, v in tensors.items() if "layer.1.output.dense.bias" not in k}
    save_file(lacking, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weight encoder\.layer\.1\.output\.dense\.bias"):
        convert_checkpoint(tmp_path)
    save_file(tensors, file, {"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "gpt2"}, "no skill can start from an encoder of the type 'gpt2'"),
        ({"num_attention_heads": 5}, r"model\.dim 12 must divide by model\.num_heads 5"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(tmp_path)


def test_token_rows_follow_the_ids_of_another_tokenizer(tmp_path: Path) -> None:
    save_checkpoint("bert", tmp_path)
    before = convert_checkpoint(tmp_path).get_parameter("stems.token.embedding.weight")
    model = convert_checkpoint(tmp_path, token_rows=[1, None, 0])
    after = model.get_parameter("stems.token.embedding.weight")
    assert model.config.vocab_size == 3
    torch.testing.assert_close(after, torch.stack([before[1], before.mean(0), before[0]]))


def test_layers_without_a_place_for_a_weight_are_rejected() -> None:
    dense = build_system("dense", small_config(bias=True), {"ffn_dim": 12})
    with pytest.raises(ValueError, match=r"no place for 12 weights of its encoder: encoder\.lay"):
        copy_to_skills(dict(dense.named_parameters()), small_model(num_layers=1, bias=True))


def test_noise_separates_skills_that_are_always_active_together() -> None:
    plans = [("general", "text"), ("general", "sound", "ear")]
    groups = find_inseparable_skills(plans, ("general", "text", "sound", "ear", "unused"))
    assert groups == [("sound", "ear")]
    config = small_config()
    dense = build_system("dense", config, {"ffn_dim": config.ffn_dim}).double()
    ours = small_model()
    weights = copy_to_skills(dict(dense.named_parameters()), ours)
    ours.load_partial(weights)
    assert separate_skills(ours, [("general", "text")], 0.0, seed=1) == []
    assert separate_skills(ours, [("general", "text")], 0.1, seed=1) == ["text"]
    differing = {n for n, p in ours.named_parameters() if n in weights and not p.equal(weights[n])}
    assert differing == {
        f"encoder.layers.{layer}.feedforward.{part}.weights.text"
        for layer in (0, 1)
        for part in ("up", "down")
    }
    for name in differing:
        before = weights[name].detach()
        noise = float((ours.get_parameter(name).detach() - before).std())
        assert noise == pytest.approx(0.1 * float(before.std()), rel=0.3)


@torch.no_grad()
def test_integer_buffers_of_older_versions_are_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_checkpoint("bert", tmp_path)
    expected = dict(convert_checkpoint(tmp_path).named_parameters())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    buffers = {
        "bert.embeddings.position_ids": torch.arange(12)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 12, dtype=torch.long),
        "bert.mask": torch.ones(2, dtype=torch.bool),
        "bert.scale": torch.ones(2, dtype=torch.uint8),
    }
    save_file(tensors | buffers, file, {"format": "pt"})
    found = dict(convert_checkpoint(tmp_path).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    quantized = {
        name: value.to(torch.int8) if name.endswith("layer.1.output.dense.weight") else value
        for name, value in tensors.items()
    }
    save_file(quantized, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weight encoder\.layer\.1\.output\.dense\.weight"):
        convert_checkpoint(tmp_path)


NAN = float("nan")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_std", [0, 0, 0]),
        ("image_std", [0.5, 0.5, -0.5]),
        ("image_std", [NAN] * 3),
        ("image_std", [float("inf")] * 3),
        ("image_std", []),
        ("image_std", 0.5),
        ("image_mean", [NAN, 0.5, 0.5]),
        ("image_mean", ["a", "b", "c"]),
        ("image_mean", {"r": 1}),
        ("image_mean", [10**400] * 3),
    ],
)
def test_a_normalization_that_is_none_is_rejected(tmp_path: Path, key: str, value: Any) -> None:
    save_checkpoint("vit", tmp_path)
    file = tmp_path / "preprocessor_config.json"
    whole = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    file.write_text(json.dumps(whole | {key: value}))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {key} is .*, expected three"):
        convert_checkpoint(tmp_path)
    file.unlink()
    save_checkpoint("timm", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    short = key.removeprefix("image_")
    settings["pretrained_cfg"][short] = value
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"config.json: {short} is .*, expected three"):
        convert_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe", b"[]", b"{", b"null"])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_damaged_json_file_is_one_message_with_its_name(tmp_path, name, content):
    save_checkpoint("vit", tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))) as caught:
        start = find_library_checkpoint(str(tmp_path))
        assert start is not None
        import_checkpoint(start, str(tmp_path / "runs"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_safetensors_file_is_one_message_with_its_name(tmp_path, kept):
    save_checkpoint("bert", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=re.escape(str(file))) as caught:
        find_library_checkpoint(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**400},
        {"num_hidden_layers": "x"},
        {"num_attention_heads": 0},
        {"num_attention_heads": None},
        {"layer_norm_eps": NAN},
        {"layer_norm_eps": -1},
        {"pad_token_id": [1]},
        {"hidden_act": {}},
    ],
    ids=str,
)
def test_a_damaged_value_is_one_message_with_its_folder(tmp_path, changes):
    save_checkpoint("bert", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as caught:
        convert_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
