"""Families of pretrained encoders, and the place of each of their weights in ours.

| family | library | layers | stem |
|---|---|---|---|
| BERT (Devlin et al. 2019) | transformers | post-norm | token |
| RoBERTa (Liu et al. 2019) | transformers | post-norm | token |
| ViT (Dosovitskiy et al. 2021) | transformers, timm | pre-norm | patch, with a class token |
| Whisper's encoder (Radford et al. 2023) | transformers | pre-norm | log_mel |
| wav2vec 2.0 (Baevski et al. 2020) | transformers | either | none |

The stem of wav2vec 2.0 reads waveforms, which SkillNet does not. So only its layers are converted,
and the norm of their input.

Sizes are those of the weights. The library's configuration gives only what the weights do not show:
heads, eps and the activation.

Shapes: D model width, F feed-forward width, p side of a patch, C channels.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skillnet.bounds import MAX_LAYERS
from skillnet.skill_copies import DENSE_SKILL
from skillnet_hf.checkpoint_weights import CheckpointWeights
from skillnet_hf.hf_checkpoints import read_library_json

Weights = dict[str, Tensor]
Settings = dict[str, Any]


def _parts_without_bias(config: Mapping[str, Any]) -> Collection[str]:
    return () if config.get("qkv_bias", True) else ("query", "key", "value", "qkv")


@dataclass(frozen=True)
class EncoderFamily:
    """Place of a family's weights, and the settings of the model section that it needs.

    Args:
        name: for messages.
        modality: that its stem reads.
        prefixes, unused: see :class:`CheckpointWeights`.
        layer: part of a layer -> spellings of its weight, with ``{}`` for the number of the layer.
        num_layers: key of the number of layers in the library's configuration.
        num_heads: key of the number of heads.
        norm_eps: returns the eps of the norms from the library's configuration.
        activation: key of the activation.
        is_post_norm: returns whether a norm follows the sum of a branch from the library's
            configuration.
        has_stem: whether the weights of the stem are converted.
        unbiased: returns the parts of a layer without a bias from the library's configuration.
        convert_stem: takes the weights of the stem; returns ours and its settings.
    """

    name: str
    modality: str
    prefixes: tuple[str, ...]
    unused: str
    layer: Mapping[str, tuple[str, ...]]
    convert_stem: Callable[[CheckpointWeights, Mapping[str, Any]], tuple[Weights, Settings]]
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    norm_eps: Callable[[Mapping[str, Any]], float] = lambda config: float(config["layer_norm_eps"])
    activation: str = "hidden_act"
    is_post_norm: Callable[[Mapping[str, Any]], bool] = lambda config: False
    has_stem: bool = True
    unbiased: Callable[[Mapping[str, Any]], Collection[str]] = _parts_without_bias

    def convert(
        self, weights: CheckpointWeights, config: Mapping[str, Any]
    ) -> tuple[Weights, Settings]:
        """Return all weights under the names of a dense SkillNet, and its settings.

        Args:
            weights: tensors of the checkpoint; all are taken.
            config: the library's configuration.

        Raises:
            ValueError: a weight is missing or left, or the configuration has another activation.
        """
        try:
            layers, heads = int(config[self.num_layers]), int(config[self.num_heads])
            eps, activation = self.norm_eps(config), config[self.activation]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{weights.folder}/config.json: {self.name} needs the key {error}"
            ) from None
        if not 1 <= layers <= MAX_LAYERS:
            raise ValueError(
                f"{weights.folder}/config.json: {self.num_layers} is {layers}, expected 1 to "
                f"{MAX_LAYERS}"
            )
        if activation != "gelu":
            raise ValueError(
                f"{weights.folder}/config.json: {self.activation} is {activation!r}; SkillNet's "
                "layers compute gelu. Give a checkpoint with gelu"
            )
        is_post_norm = self.is_post_norm(config)
        found, settings = self.convert_stem(weights, config)
        for index in range(layers):
            found |= self._convert_layer(weights, index, self.unbiased(config))
        if not is_post_norm:
            for part in ("weight", "bias"):
                names = (f"layernorm.{part}", f"layer_norm.{part}", f"norm.{part}")
                found[f"encoder.norm.{part}"] = weights.take(*names)
        weights.require_empty()
        up = next(v for name, v in found.items() if name.endswith(f"up.weights.{DENSE_SKILL}"))
        return found, settings | {
            "dim": up.shape[1],
            "num_layers": layers,
            "num_heads": heads,
            "ffn_dim": up.shape[0],
            "bias": True,
            "norm_position": "post" if is_post_norm else "pre",
            "norm_eps": eps,
        }

    def _convert_layer(
        self, weights: CheckpointWeights, index: int, unbiased: Collection[str]
    ) -> Weights:
        names = {key: [name.format(index) for name in found] for key, found in self.layer.items()}
        ours = f"encoder.layers.{index}"
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for key in names.keys() - {"attention_norm", "feedforward_norm"}:
            weight = weights.take(*(f"{name}.weight" for name in names[key]))
            # A bias of zeros is the same function as none.
            bias = torch.zeros_like(weight[:, 0])
            if key not in unbiased:
                bias = weights.take(*(f"{name}.bias" for name in names[key]))
            pairs[key] = weight, bias
        if "qkv" not in pairs:
            parts = [pairs.pop(key) for key in ("query", "key", "value")]
            weight, bias = (torch.cat(part) for part in zip(*parts, strict=True))
            pairs["qkv"] = weight, bias
        found = {
            f"{ours}.attention.qkv.weight": pairs["qkv"][0],
            f"{ours}.attention.qkv.bias": pairs["qkv"][1],
            f"{ours}.attention.out.weight": pairs["out"][0],
            f"{ours}.attention.out.bias": pairs["out"][1],
            f"{ours}.feedforward.up": pairs["up"][0],
            f"{ours}.feedforward.up_bias": pairs["up"][1],
            f"{ours}.feedforward.down": pairs["down"][0],
            f"{ours}.feedforward.down_bias": pairs["down"][1],
        }
        found = {f"{name}.weights.{DENSE_SKILL}": value for name, value in found.items()}
        for norm in ("attention_norm", "feedforward_norm"):
            for part in ("weight", "bias"):
                spelled = (f"{name}.{part}" for name in names[norm])
                found[f"{ours}.{norm}.{part}"] = weights.take(*spelled)
        return found


def _convert_token_stem(
    weights: CheckpointWeights, config: Mapping[str, Any]
) -> tuple[Weights, Settings]:
    position = weights.take("embeddings.position_embeddings.weight")
    if config.get("model_type") == "roberta":
        # The positions of RoBERTa count real tokens, from the padding id on.
        position = position[int(config.get("pad_token_id", 1)) + 1 :]
    embedding = weights.take("embeddings.word_embeddings.weight")
    # A text is one segment, so the vector of the first segment belongs to every token.
    segment = weights.take("embeddings.token_type_embeddings.weight")[0]
    found = {
        "stems.token.embedding.weight": embedding,
        "stems.token.position": position,
        "stems.token.modality.text": segment,
        "stems.token.modality.code": segment,
    }
    for part in ("weight", "bias"):
        found[f"stems.token.norm.{part}"] = weights.take(f"embeddings.LayerNorm.{part}")
    return found, {
        "vocab_size": len(embedding),
        "max_tokens": len(position),
        "bigram_buckets": 0,
        "stem_norm": True,
    }


def _convert_patch_stem(
    weights: CheckpointWeights, config: Mapping[str, Any]
) -> tuple[Weights, Settings]:
    kernel_DCpp = weights.take(
        "embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight"
    )
    bias_D = weights.take("embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias")
    position_TD = weights.take("embeddings.position_embeddings", "pos_embed")[0]
    class_token = weights.find("embeddings.cls_token", "cls_token")
    weights.find("embeddings.mask_token")  # only masked pretraining reads it
    D, C, side, _ = kernel_DCpp.shape
    if C != 3:
        raise ValueError(f"{weights.folder}: images of {C} channels; SkillNet reads 3")
    mean_C, std_C = _read_normalization(weights.folder, config)
    # SkillNet's pixels lie in [-1, 1], the library's are normalized by mean and deviation.
    shift_C = ((0.5 - mean_C) / std_C).to(kernel_DCpp.dtype)
    bias_D = bias_D + (kernel_DCpp.sum((2, 3)) * shift_C).sum(1)
    kernel_DCpp = kernel_DCpp / (2 * std_C).to(kernel_DCpp.dtype)[:, None, None]
    found = {
        "stems.patch.project.weight": kernel_DCpp.permute(0, 2, 3, 1).reshape(D, -1).contiguous(),
        "stems.patch.project.bias": bias_D,
    }
    count = len(position_TD)
    if class_token is not None:
        # Some ViTs have no position of the class token.
        has_position = int(count**0.5) ** 2 != count
        first = position_TD[0] if has_position else 0
        found["stems.patch.class_token"] = class_token.reshape(-1) + first
        position_TD = position_TD[1:] if has_position else position_TD
    across = int(len(position_TD) ** 0.5)
    if across**2 != len(position_TD):
        raise ValueError(
            f"{weights.folder}: {len(position_TD)} positions are no square; SkillNet reads square "
            "images without register tokens"
        )
    found["stems.patch.position"] = position_TD
    return found, {
        "image_size": across * side,
        "patch_size": side,
        "class_token": class_token is not None,
        "stem_norm": False,
    }


def _read_normalization(folder: Path, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (C,) of the pixels in [0, 1] that a checkpoint was trained on."""
    file, keys, values = folder / "config.json", ("mean", "std"), config
    if (folder / "preprocessor_config.json").is_file():
        file, keys = folder / "preprocessor_config.json", ("image_mean", "image_std")
        values = read_library_json(file)
    found = []
    for key in keys:
        given = values.get(key)
        try:
            row_C = torch.tensor([0.5] * 3 if given is None else given, dtype=torch.float64)
            is_valid = row_C.shape == (3,) and bool(row_C.isfinite().all())
        except (TypeError, ValueError, RuntimeError, OverflowError):
            is_valid = False
        if not is_valid or (key == keys[1] and not bool((row_C > 0).all())):
            kind = "numbers above 0" if key == keys[1] else "finite numbers"
            raise ValueError(
                f"{file}: {key} is {given}, expected three {kind}. Correct it, or download the "
                "file again"
            )
        found.append(row_C)
    return found[0], found[1]


def _convert_log_mel_stem(
    weights: CheckpointWeights, config: Mapping[str, Any]
) -> tuple[Weights, Settings]:
    found = {
        f"stems.log_mel.{ours}.{part}": weights.take(f"{theirs}.{part}")
        for ours, theirs in (("first", "conv1"), ("second", "conv2"))
        for part in ("weight", "bias")
    }
    position = weights.take("embed_positions.weight")
    return found | {"stems.log_mel.position": position}, {
        "n_mels": found["stems.log_mel.first.weight"].shape[1],
        "mel_stack": 2,
        "max_frames": 2 * len(position),
        "stem_norm": False,
    }


def _has_post_norm(config: Mapping[str, Any]) -> bool:
    return not config.get("do_stable_layer_norm", False)


def _convert_input_norm(
    weights: CheckpointWeights, config: Mapping[str, Any]
) -> tuple[Weights, Settings]:
    """Return the norm of the layers' input; with pre-norm it is the norm after the last layer."""
    if not _has_post_norm(config):
        return {}, {"stem_norm": False}
    found = {
        f"stems.log_mel.norm.{part}": weights.take(f"layer_norm.{part}")
        for part in ("weight", "bias")
    }
    return found, {"stem_norm": True}


_BERT_LAYER = {
    "query": ("encoder.layer.{}.attention.self.query",),
    "key": ("encoder.layer.{}.attention.self.key",),
    "value": ("encoder.layer.{}.attention.self.value",),
    "out": ("encoder.layer.{}.attention.output.dense",),
    "attention_norm": ("encoder.layer.{}.attention.output.LayerNorm",),
    "up": ("encoder.layer.{}.intermediate.dense",),
    "down": ("encoder.layer.{}.output.dense",),
    "feedforward_norm": ("encoder.layer.{}.output.LayerNorm",),
}

#: The second spelling is that of transformers 5 in memory, the first that of its files.
_VIT_LAYER = {
    "query": ("encoder.layer.{}.attention.attention.query", "layers.{}.attention.q_proj"),
    "key": ("encoder.layer.{}.attention.attention.key", "layers.{}.attention.k_proj"),
    "value": ("encoder.layer.{}.attention.attention.value", "layers.{}.attention.v_proj"),
    "out": ("encoder.layer.{}.attention.output.dense", "layers.{}.attention.o_proj"),
    "attention_norm": ("encoder.layer.{}.layernorm_before", "layers.{}.layernorm_before"),
    "up": ("encoder.layer.{}.intermediate.dense", "layers.{}.mlp.fc1"),
    "down": ("encoder.layer.{}.output.dense", "layers.{}.mlp.fc2"),
    "feedforward_norm": ("encoder.layer.{}.layernorm_after", "layers.{}.layernorm_after"),
}

_TIMM_LAYER = {
    "qkv": ("blocks.{}.attn.qkv",),
    "out": ("blocks.{}.attn.proj",),
    "attention_norm": ("blocks.{}.norm1",),
    "up": ("blocks.{}.mlp.fc1",),
    "down": ("blocks.{}.mlp.fc2",),
    "feedforward_norm": ("blocks.{}.norm2",),
}

_WHISPER_LAYER = {
    "query": ("layers.{}.self_attn.q_proj",),
    "key": ("layers.{}.self_attn.k_proj",),
    "value": ("layers.{}.self_attn.v_proj",),
    "out": ("layers.{}.self_attn.out_proj",),
    "attention_norm": ("layers.{}.self_attn_layer_norm",),
    "up": ("layers.{}.fc1",),
    "down": ("layers.{}.fc2",),
    "feedforward_norm": ("layers.{}.final_layer_norm",),
}


_WAV2VEC2_LAYER = {
    "query": ("layers.{}.attention.q_proj",),
    "key": ("layers.{}.attention.k_proj",),
    "value": ("layers.{}.attention.v_proj",),
    "out": ("layers.{}.attention.out_proj",),
    "attention_norm": ("layers.{}.layer_norm",),
    "up": ("layers.{}.feed_forward.intermediate_dense",),
    "down": ("layers.{}.feed_forward.output_dense",),
    "feedforward_norm": ("layers.{}.final_layer_norm",),
}


def _bert_family(name: str) -> EncoderFamily:
    return EncoderFamily(
        name,
        "text",
        (f"{name}.",),
        r"pooler\.|cls\.|lm_head\.|classifier\.|qa_outputs\.|.*position_ids$",
        _BERT_LAYER,
        _convert_token_stem,
        is_post_norm=lambda config: True,
    )


#: ``model_type`` of transformers, or ``timm`` -> family.
FAMILIES: dict[str, EncoderFamily] = {
    "bert": _bert_family("bert"),
    "roberta": _bert_family("roberta"),
    "vit": EncoderFamily(
        "vit",
        "image",
        ("vit.",),
        r"pooler\.|classifier\.|decoder\.",
        _VIT_LAYER,
        _convert_patch_stem,
    ),
    "timm": EncoderFamily("timm", "image", (), r"head\.", _TIMM_LAYER, _convert_patch_stem),
    "whisper": EncoderFamily(
        "whisper",
        "sound",
        ("model.encoder.", "encoder."),
        r"(model\.)?decoder\.|proj_out\.|projector\.|classifier\.|layer_weights$",
        _WHISPER_LAYER,
        _convert_log_mel_stem,
        num_layers="encoder_layers",
        num_heads="encoder_attention_heads",
        norm_eps=lambda config: 1e-5,
        activation="activation_function",
        unbiased=lambda config: ("key",),
    ),
    "wav2vec2": EncoderFamily(
        "wav2vec2",
        "sound",
        ("wav2vec2.encoder.", "encoder."),
        r"(wav2vec2\.)?(feature_extractor\.|feature_projection\.|masked_spec_embed$)"
        r"|pos_conv_embed\.|quantizer\.|project_(q|hid)\.|lm_head\.|projector\.|classifier\."
        r"|layer_weights$",
        _WAV2VEC2_LAYER,
        _convert_input_norm,
        is_post_norm=_has_post_norm,
        has_stem=False,
    ),
}
