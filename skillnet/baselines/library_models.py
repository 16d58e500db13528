"""The library models that specialists are made of: from scratch at the study's size, or from a
checkpoint. A family knows its library's configuration; :mod:`skillnet.baselines.library_encoders` runs it.

A *shape* is a family's configuration in plain types: saved with a trained model, it builds the
model again where the checkpoint is not at hand.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from skillnet.baselines import library_encoders
from skillnet.baselines.hf_checkpoints import at_least, equal, quiet, read_config, require_finite
from skillnet.config import SkillNetConfig
from skillnet.stems import PAD

Shape = dict[str, Any]


class Family:
    """One architecture of a library."""

    name: str
    tower: type[library_encoders.Tower]

    def fresh(self, config: SkillNetConfig, hidden: int) -> Shape:
        """The shape at the study's depth, width and heads, ``hidden`` wide in its layers.

        Raises:
            ValueError: inputs of the study that this architecture cannot cut as SkillNet does.
        """
        raise NotImplementedError

    def read(self, folder: Path, config: SkillNetConfig) -> Shape:
        """The shape of a checkpoint. ValueError if it is another architecture or does not fit."""
        raise NotImplementedError

    def build(self, shape: Shape, dim: int, weights: Path | None = None) -> library_encoders.Tower:
        """A tower of width ``dim`` outside, fresh or with a checkpoint's weights."""
        raise NotImplementedError


class Transformers(Family):
    """A model of transformers.

    Attributes:
        config_class, model_class: names in transformers; the model as checkpoints keep it.
        width_key: name of the width in its configuration.
    """

    config_class: str
    model_class: str
    width_key = "hidden_size"
    options: dict[str, Any] = {}  # noqa: RUF012

    def sizes(self, config: SkillNetConfig, hidden: int) -> dict[str, Any]:
        """Keyword arguments of the library's configuration, from scratch."""
        return {
            "hidden_size": config.dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": hidden,
        }

    def inputs(self, config: SkillNetConfig) -> dict[str, Any]:
        """Keyword arguments that the study's inputs decide, with or without a checkpoint."""
        return {}

    def check(self, found: Any, config: SkillNetConfig) -> None:
        """ValueError, naming the key, if a checkpoint's configuration does not fit the study."""

    def fresh(self, config: SkillNetConfig, hidden: int) -> Shape:
        return self._plain(self._config(self.sizes(config, hidden) | self.inputs(config)))

    def read(self, folder: Path, config: SkillNetConfig) -> Shape:
        told = read_config(folder)
        expected = self._class(self.config_class).model_type
        if told.get("model_type") != expected:
            raise ValueError(
                f"{folder} holds a model of the type {told.get('model_type')!r}, not {expected!r}"
            )
        if "quantization_config" in told:
            raise ValueError(f"{folder} holds quantised weights; give it in full precision")
        found = self._class(self.config_class).from_dict(told | self.inputs(config))
        self.check(found, config)
        return self._plain(found)

    def build(self, shape: Shape, dim: int, weights: Path | None = None) -> library_encoders.Tower:
        config = self._config(shape)
        model = self.model(config) if weights is None else self._load(weights, config)
        return self.tower(model, getattr(config, self.width_key), dim)

    def model(self, config: Any) -> Any:
        """A fresh model, without what no task here reads."""
        return self._class(self.model_class)(config, **self.options)

    def encoder_of(self, model: Any) -> Any:
        """The part of a loaded model that reads inputs."""
        return model

    def _load(self, folder: Path, config: Any) -> Any:
        with quiet():
            model, told = self._class(self.model_class).from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                **self.options,
            )
        if told["missing_keys"]:
            first = sorted(told["missing_keys"])[0]
            raise ValueError(
                f"{folder} lacks {len(told['missing_keys'])} weights of {self.model_class}, "
                f"{first} among them"
            )
        require_finite(model, folder)
        return self.encoder_of(model)

    def _config(self, values: dict[str, Any]) -> Any:
        config = self._class(self.config_class)(**values)
        config._attn_implementation = "eager"
        return config

    @staticmethod
    def _plain(config: Any) -> Shape:
        kept = config.to_diff_dict()
        # What a library version writes about itself is no part of the shape.
        return json.loads(json.dumps({k: v for k, v in kept.items() if k not in _ABOUT}))

    @staticmethod
    def _class(name: str) -> Any:
        import transformers
        from transformers.models.speech_to_text.modeling_speech_to_text import Speech2TextEncoder

        return Speech2TextEncoder if name == "Speech2TextEncoder" else getattr(transformers, name)


class Bert(Transformers):
    """BERT (Devlin et al. 2019) without the pooler of its next-sentence task."""

    name, tower = "bert", library_encoders.TextTower
    config_class, model_class = "BertConfig", "BertModel"
    options = {"add_pooling_layer": False}  # noqa: RUF012
    before = 0

    def sizes(self, config: SkillNetConfig, hidden: int) -> dict[str, Any]:
        return super().sizes(config, hidden) | {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_tokens + self.before,
            "type_vocab_size": 1,
            "pad_token_id": PAD,
        }

    def inputs(self, config: SkillNetConfig) -> dict[str, Any]:
        # Nothing is dropped from attention itself, as in SkillNet: on CPUs that takes a tenth of
        # the time.
        return {"hidden_dropout_prob": layer_dropout(config), "attention_probs_dropout_prob": 0.0}

    def check(self, found: Any, config: SkillNetConfig) -> None:
        at_least("vocab_size", found.vocab_size, "vocab_size", config.vocab_size)
        positions = found.max_position_embeddings - self.before
        at_least("max_position_embeddings", positions, "max_tokens", config.max_tokens)
        if found.pad_token_id != PAD:
            raise ValueError(f"the checkpoint pads with {found.pad_token_id}, the corpora with 0")


class Roberta(Bert):
    """RoBERTa (Liu et al. 2019): BERT whose positions count real tokens, after the padding id."""

    name = "roberta"
    config_class, model_class = "RobertaConfig", "RobertaModel"
    before = PAD + 1


class VideoMAE(Transformers):
    """The encoder of VideoMAE (Tong et al. 2022): joint attention of all tubelets, fixed positions.

    Every token is encoded: masks are laid on the input, as for all systems.
    """

    name, tower = "videomae", library_encoders.VideoTower
    config_class, model_class = "VideoMAEConfig", "VideoMAEModel"

    def sizes(self, config: SkillNetConfig, hidden: int) -> dict[str, Any]:
        frames, height, width = config.tubelet
        if height != width:
            raise ValueError(
                f"VideoMAE cuts squares; model.tubelet {list(config.tubelet)} is no square in "
                "height and width"
            )
        return super().sizes(config, hidden) | {
            "tubelet_size": frames,
            "patch_size": height,
            "num_channels": 6 if config.video_motion else 3,
            "use_mean_pooling": False,
        }

    def inputs(self, config: SkillNetConfig) -> dict[str, Any]:
        return {
            "image_size": config.video_size,
            "num_frames": config.video_frames,
            "hidden_dropout_prob": layer_dropout(config),
        }

    def check(self, found: Any, config: SkillNetConfig) -> None:
        cut = (found.tubelet_size, found.patch_size, found.patch_size)
        equal("(tubelet_size, patch_size, patch_size)", cut, "tubelet", config.tubelet)


class Speech2Text(Transformers):
    """The encoder of the Speech-to-Text Transformer (Wang et al. 2020), made for recognition.

    Convolutions with gated linear units take ``mel_stack`` frames to a token.
    """

    name, tower = "speech2text", library_encoders.SoundTower
    config_class, model_class = "Speech2TextConfig", "Speech2TextModel"
    width_key = "d_model"

    def sizes(self, config: SkillNetConfig, hidden: int) -> dict[str, Any]:
        layers = int(math.log2(config.mel_stack))
        if 2**layers != config.mel_stack or not layers:
            raise ValueError(
                "Speech2Text halves the frames by each convolution: model.mel_stack must be 2, 4, "
                f"8, …, not {config.mel_stack}"
            )
        return {
            "d_model": config.dim,
            "encoder_layers": config.num_layers,
            "encoder_attention_heads": config.num_heads,
            "encoder_ffn_dim": hidden,
            "input_feat_per_channel": config.n_mels,
            "num_conv_layers": layers,
            "conv_kernel_sizes": [5] * layers,
            "conv_channels": 2 * config.dim,
            "decoder_layers": 1,
            "vocab_size": 4,
        }

    def inputs(self, config: SkillNetConfig) -> dict[str, Any]:
        return {"dropout": layer_dropout(config)}

    def check(self, found: Any, config: SkillNetConfig) -> None:
        equal("input_feat_per_channel", found.input_feat_per_channel, "n_mels", config.n_mels)
        equal("2 ** num_conv_layers", 2**found.num_conv_layers, "mel_stack", config.mel_stack)

    def model(self, config: Any) -> Any:
        return self._class("Speech2TextEncoder")(config)

    def encoder_of(self, model: Any) -> Any:
        return model.encoder


class AST(Transformers):
    """Audio Spectrogram Transformer (Gong et al. 2021), its time stride that of SkillNet's tokens.

    In frequency patches do not overlap, which saves a third of the tokens.
    """

    name, tower = "ast", library_encoders.SpectrogramTower
    config_class, model_class = "ASTConfig", "ASTModel"

    def sizes(self, config: SkillNetConfig, hidden: int) -> dict[str, Any]:
        patch = min(16, config.n_mels)
        if patch < config.mel_stack:
            raise ValueError(
                f"model.mel_stack {config.mel_stack} is more than the {patch} frames of a patch"
            )
        return super().sizes(config, hidden) | {
            "patch_size": patch,
            "time_stride": config.mel_stack,
            "frequency_stride": patch,
            "num_mel_bins": config.n_mels,
            "max_length": _ast_length(config, patch),
        }

    def inputs(self, config: SkillNetConfig) -> dict[str, Any]:
        return {"hidden_dropout_prob": layer_dropout(config)}

    def check(self, found: Any, config: SkillNetConfig) -> None:
        equal("num_mel_bins", found.num_mel_bins, "n_mels", config.n_mels)
        equal("time_stride", found.time_stride, "mel_stack", config.mel_stack)
        needed = _ast_length(config, found.patch_size)
        at_least("max_length", found.max_length, f"max_frames ({needed} with padding)", needed)


class ViT(Family):
    """Vision Transformer (Dosovitskiy et al. 2021) of timm, without a class token from scratch.

    A checkpoint of another picture or patch size is resampled by timm.
    """

    name, tower = "vit", library_encoders.ImageTower

    def fresh(self, config: SkillNetConfig, hidden: int) -> Shape:
        return {
            "architecture": "vit_base_patch16_224",
            "arguments": {
                "embed_dim": config.dim,
                "depth": config.num_layers,
                "num_heads": config.num_heads,
                # timm rounds the product down.
                "mlp_ratio": (hidden + 0.5) / config.dim,
                "class_token": False,
            }
            | self._inputs(config),
        }

    def read(self, folder: Path, config: SkillNetConfig) -> Shape:
        told = read_config(folder)
        name = told.get("architecture", "")
        if not str(name).startswith("vit_"):
            raise ValueError(f"{folder} holds no Vision Transformer of timm but {name or told}")
        return {
            "architecture": name,
            "arguments": told.get("model_args", {}) | self._inputs(config),
        }

    def build(self, shape: Shape, dim: int, weights: Path | None = None) -> library_encoders.Tower:
        import timm

        _check_architecture(shape["architecture"], shape["arguments"])
        extra: dict[str, Any] = {}
        if weights is not None:
            file = str(next(iter(sorted(weights.glob("*.safetensors")))))
            extra = {"pretrained": True, "pretrained_cfg_overlay": {"file": file}}
        try:
            model: Any = timm.create_model(shape["architecture"], **shape["arguments"], **extra)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{weights or shape['architecture']}: {error}") from None
        if weights is not None:
            require_finite(model, weights)
        return self.tower(model, model.embed_dim, dim)

    @staticmethod
    def _inputs(config: SkillNetConfig) -> dict[str, Any]:
        return {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "num_classes": 0,
            "global_pool": "",
            "drop_path_rate": config.drop_path,
            "pos_drop_rate": config.dropout,
        }


#: Arguments of timm's that name files or addresses to load, beside the sizes of the model.
_LOADS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def _check_architecture(name: Any, arguments: Any) -> None:
    """ValueError unless a name is of a Vision Transformer that timm has itself, and its arguments
    are only sizes: both may come from a checkpoint that anyone made."""
    import timm

    if not isinstance(name, str) or not name.startswith("vit_") or not timm.is_model(name):
        raise ValueError(f"{name!r} is no Vision Transformer of this version of timm")
    if not isinstance(arguments, dict) or _LOADS & set(arguments):
        raise ValueError(f"{name}: its arguments name other things to load; they may be sizes only")


FAMILIES: dict[str, Family] = {
    family.name: family for family in (Bert(), Roberta(), ViT(), Speech2Text(), AST(), VideoMAE())
}

_ABOUT = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path")


def layer_dropout(config: SkillNetConfig) -> float:
    """The rate at which layers of transformers drop values: what regularises SkillNet's most."""
    return max(config.drop_path, config.dropout)


def _ast_length(config: SkillNetConfig, patch: int) -> int:
    """Frames, padding included, after which every token has a patch."""
    steps = -(-config.max_frames // config.mel_stack)
    return (steps - 1) * config.mel_stack + patch
