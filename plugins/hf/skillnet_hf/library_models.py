"""Library architectures of the specialists: from scratch at the study's size, or from a checkpoint.

An architecture translates the study's configuration into the library's.
:mod:`skillnet_hf.library_encoders` runs the models.

A *shape* is the library's configuration in plain types. It is saved with a trained model, which
can then be rebuilt without the checkpoint.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from pipelines.data.tokenizer.selection import map_token_ids
from skillnet.config import SkillNetConfig
from skillnet.modalities.tensors import PAD
from skillnet_hf import library_encoders
from skillnet_hf.checkpoint_weights import reorder_rows
from skillnet_hf.hf_checkpoints import (
    read_library_config,
    require_at_least,
    require_equal,
    require_finite,
    silence_library_logs,
)
from skillnet_hf.shape_bounds import check_shape, check_table

Shape = dict[str, Any]


class LibraryArchitecture:
    """Encoder architecture of a library."""

    name: str
    tower: type[library_encoders.EncoderAdapter]

    def fresh(self, config: SkillNetConfig, hidden: int) -> Shape:
        """Return the shape at the study's number of layers, width and heads.

        Args:
            config: configuration of the study.
            hidden: feed-forward width.

        Raises:
            ValueError: the architecture cannot divide the study's inputs as SkillNet does.
        """
        raise NotImplementedError

    def read(self, folder: Path, config: SkillNetConfig) -> Shape:
        """Return the shape of a checkpoint. Raise ValueError if it does not fit the study."""
        raise NotImplementedError

    def build(
        self, shape: Shape, dim: int, weights: Path | None = None
    ) -> library_encoders.EncoderAdapter:
        """Build an encoder.

        Args:
            shape: configuration of the library.
            dim: width that the heads expect.
            weights: directory of a checkpoint; None draws random weights.
        """
        raise NotImplementedError


class TransformersArchitecture(LibraryArchitecture):
    """Architecture of transformers.

    Attributes:
        config_class, model_class: names in transformers; the model class of saved checkpoints.
        width_key: key of the width in its configuration.
    """

    config_class: str
    model_class: str
    width_key = "hidden_size"
    options: dict[str, Any] = {}  # noqa: RUF012

    def sizes(self, config: SkillNetConfig, hidden: int) -> dict[str, Any]:
        """Return keyword arguments of the library's configuration, from scratch."""
        return {
            "hidden_size": config.dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": hidden,
        }

    def inputs(self, config: SkillNetConfig) -> dict[str, Any]:
        """Return keyword arguments that follow from the study's inputs."""
        return {}

    def token_sizes(self, folder: Path, config: SkillNetConfig) -> dict[str, Any]:
        """Return keyword arguments that follow from the tokenizer of a checkpoint.

        Args:
            folder: directory of the checkpoint.
            config: configuration of the study.

        Raises:
            ValueError: the study reads other tokens.
        """
        return {}

    def check(self, found: Any, config: SkillNetConfig) -> None:
        """Raise ValueError, naming the key, if a checkpoint does not fit the study."""

    def check_tables(self, found: Any) -> None:
        """Raise ValueError if the library would build a table of fixed positions that is too large.

        Args:
            found: configuration of the library.
        """

    def fresh(self, config: SkillNetConfig, hidden: int) -> Shape:
        return self._plain(self._config(self.sizes(config, hidden) | self.inputs(config)))

    def read(self, folder: Path, config: SkillNetConfig) -> Shape:
        values = read_library_config(folder)
        expected = self._class(self.config_class).model_type
        if values.get("model_type") != expected:
            raise ValueError(
                f"{folder} holds a model of the type {values.get('model_type')!r}, not {expected!r}"
            )
        if "quantization_config" in values:
            raise ValueError(f"{folder} holds quantized weights; give it in full precision")
        settings = {key: value for key, value in values.items() if key in self._settings()}
        check_shape(f"{folder}/config.json", settings)
        own = self.inputs(config) | self.token_sizes(folder, config)
        found = self._class(self.config_class).from_dict(settings | own)
        self.check(found, config)
        return self._plain(found)

    def build(
        self, shape: Shape, dim: int, weights: Path | None = None
    ) -> library_encoders.EncoderAdapter:
        check_shape(f"shape of {self.name}", shape, self._settings())
        config = self._config(shape)
        self.check_tables(config)
        model = self.model(config) if weights is None else self._load(weights, config)
        return self.tower(model, getattr(config, self.width_key), dim)

    def model(self, config: Any) -> Any:
        """Return a randomly initialized model without unused parts."""
        return self._class(self.model_class)(config, **self.options)

    def encoder_of(self, model: Any) -> Any:
        """Return the encoder of a loaded model."""
        return model

    def _load(self, folder: Path, config: Any) -> Any:
        with silence_library_logs():
            model, report = self._class(self.model_class).from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                **self.options,
            )
        if report["missing_keys"]:
            first = sorted(report["missing_keys"])[0]
            raise ValueError(
                f"{folder} lacks {len(report['missing_keys'])} weights of {self.model_class}, "
                f"{first} among them"
            )
        require_finite(model, folder)
        return self.encoder_of(model)

    def _config(self, values: dict[str, Any]) -> Any:
        config = self._class(self.config_class)(**values)
        config._attn_implementation = "eager"
        return config

    def _plain(self, config: Any) -> Shape:
        kept = config.to_diff_dict()
        # Labels, versions and other metadata of the library are not part of the shape.
        return json.loads(json.dumps({k: v for k, v in kept.items() if k in self._settings()}))

    def _settings(self) -> frozenset[str]:
        """Return the keys that the library documents for this model, without those of all."""
        return frozenset(self._class(self.config_class).__annotations__)

    @staticmethod
    def _class(name: str) -> Any:
        import transformers
        from transformers.models.speech_to_text.modeling_speech_to_text import Speech2TextEncoder

        return Speech2TextEncoder if name == "Speech2TextEncoder" else getattr(transformers, name)


class BertArchitecture(TransformersArchitecture):
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
        # Attention has no dropout, as in SkillNet. On CPUs this saves a tenth of the time.
        return {"hidden_dropout_prob": config.drop_path, "attention_probs_dropout_prob": 0.0}

    def token_sizes(self, folder: Path, config: SkillNetConfig) -> dict[str, Any]:
        rows = self.read_token_rows(folder)
        if rows is None:
            return {}
        if len(rows) != config.vocab_size:
            raise ValueError(
                f"{folder}/tokenizer.json has {len(rows)} tokens, and model.vocab_size is "
                f"{config.vocab_size}. Prepare the corpora with --tokenizer {folder}, and give "
                f"--model.vocab_size {len(rows)}"
            )
        return {"vocab_size": len(rows), "pad_token_id": PAD}

    def read_token_rows(self, folder: Path) -> list[int | None] | None:
        """Return for each id of a converted tokenizer that of the checkpoint.

        Args:
            folder: directory of the checkpoint.

        Returns:
            None for a checkpoint without tokenizer.json: its ids are those of the corpora.
        """
        return map_token_ids(folder)[1] if (folder / "tokenizer.json").is_file() else None

    def _load(self, folder: Path, config: Any) -> Any:
        rows = self.read_token_rows(folder)
        if rows is None:
            return super()._load(folder, config)
        theirs = {"vocab_size": read_library_config(folder).get("vocab_size")}
        model = super()._load(folder, self._config(self._plain(config) | theirs))
        weight_VW = reorder_rows(model.get_input_embeddings().weight.detach(), rows)
        model.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight_VW, False, PAD))
        model.config.vocab_size = len(rows)
        return model

    def check(self, found: Any, config: SkillNetConfig) -> None:
        require_at_least("vocab_size", found.vocab_size, "vocab_size", config.vocab_size)
        positions = found.max_position_embeddings - self.before
        require_at_least("max_position_embeddings", positions, "max_tokens", config.max_tokens)
        if found.pad_token_id != PAD:
            raise ValueError(f"the checkpoint pads with {found.pad_token_id}, the corpora with 0")


class RobertaArchitecture(BertArchitecture):
    """RoBERTa (Liu et al. 2019): BERT whose positions count real tokens, from the padding id on."""

    name = "roberta"
    config_class, model_class = "RobertaConfig", "RobertaModel"
    before = PAD + 1

    def read_token_rows(self, folder: Path) -> None:
        # Its positions follow from its padding id, which another tokenizer would change.
        return None


class VideoMAE(TransformersArchitecture):
    """Encoder of VideoMAE (Tong et al. 2022): joint attention of all tubelets, fixed positions.

    Every token is encoded. Masks are applied to the input, as for all systems.
    """

    name, tower = "videomae", library_encoders.VideoTower
    config_class, model_class = "VideoMAEConfig", "VideoMAEModel"

    def sizes(self, config: SkillNetConfig, hidden: int) -> dict[str, Any]:
        frames, height, width = config.tubelet
        if height != width:
            raise ValueError(
                f"VideoMAE uses square patches; model.tubelet {list(config.tubelet)} differs in "
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
            "hidden_dropout_prob": config.drop_path,
        }

    def check_tables(self, found: Any) -> None:
        across = _first(found.image_size) // _first(found.patch_size)
        tokens = across**2 * (found.num_frames // found.tubelet_size)
        check_table("shape of videomae", tokens, found.hidden_size)

    def check(self, found: Any, config: SkillNetConfig) -> None:
        cut = (found.tubelet_size, found.patch_size, found.patch_size)
        require_equal("(tubelet_size, patch_size, patch_size)", cut, "tubelet", config.tubelet)


class Speech2Text(TransformersArchitecture):
    """Encoder of the Speech-to-Text Transformer (Wang et al. 2020), designed for recognition.

    Convolutions with gated linear units map ``mel_stack`` frames to one token.
    """

    name, tower = "speech2text", library_encoders.SoundTower
    config_class, model_class = "Speech2TextConfig", "Speech2TextModel"
    width_key = "d_model"

    def sizes(self, config: SkillNetConfig, hidden: int) -> dict[str, Any]:
        layers = int(math.log2(config.mel_stack))
        if 2**layers != config.mel_stack or not layers:
            raise ValueError(
                "each convolution of Speech2Text halves the frames: model.mel_stack must be 2, 4, "
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
        return {"dropout": config.drop_path}

    def check_tables(self, found: Any) -> None:
        check_table("shape of speech2text", found.max_source_positions, found.d_model)

    def check(self, found: Any, config: SkillNetConfig) -> None:
        require_equal(
            "input_feat_per_channel", found.input_feat_per_channel, "n_mels", config.n_mels
        )
        require_equal(
            "2 ** num_conv_layers", 2**found.num_conv_layers, "mel_stack", config.mel_stack
        )

    def model(self, config: Any) -> Any:
        return self._class("Speech2TextEncoder")(config)

    def encoder_of(self, model: Any) -> Any:
        return model.encoder


class AstArchitecture(TransformersArchitecture):
    """Audio Spectrogram Transformer (Gong et al. 2021) with the time stride of SkillNet's tokens.

    Patches do not overlap in frequency, which saves a third of the tokens.
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
        return {"hidden_dropout_prob": config.drop_path}

    def check(self, found: Any, config: SkillNetConfig) -> None:
        require_equal("num_mel_bins", found.num_mel_bins, "n_mels", config.n_mels)
        require_equal("time_stride", found.time_stride, "mel_stack", config.mel_stack)
        needed = _ast_length(config, found.patch_size)
        require_at_least(
            "max_length", found.max_length, f"max_frames ({needed} with padding)", needed
        )


class ViT(LibraryArchitecture):
    """Vision Transformer (Dosovitskiy et al. 2021) of timm, without a class token from scratch.

    timm resamples a checkpoint of another image or patch size.
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
        values = read_library_config(folder)
        name = values.get("architecture", "")
        if not str(name).startswith("vit_"):
            raise ValueError(f"{folder} holds no Vision Transformer of timm but {name or values}")
        return {
            "architecture": name,
            "arguments": values.get("model_args", {}) | self._inputs(config),
        }

    def build(
        self, shape: Shape, dim: int, weights: Path | None = None
    ) -> library_encoders.EncoderAdapter:
        import timm

        check_architecture(shape.get("architecture"), shape.get("arguments"))
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
        }


#: Arguments of timm that name files or addresses to load. All others are sizes of the model.
_LOADS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def check_architecture(name: Any, arguments: Any) -> None:
    """Raise ValueError unless timm has this Vision Transformer and the arguments are only sizes.

    Both can come from a checkpoint of unknown origin.
    """
    import timm

    if not isinstance(name, str) or not name.startswith("vit_") or not timm.is_model(name):
        raise ValueError(f"{name!r} is no Vision Transformer of this version of timm")
    if not isinstance(arguments, dict) or _LOADS & set(arguments):
        raise ValueError(f"{name}: its arguments name other things to load; they may be sizes only")
    check_shape(name, arguments)


FAMILIES: dict[str, LibraryArchitecture] = {
    family.name: family
    for family in (
        BertArchitecture(),
        RobertaArchitecture(),
        ViT(),
        Speech2Text(),
        AstArchitecture(),
        VideoMAE(),
    )
}


def _first(size: Any) -> int:
    """Return the height of a size that is one number, or a height and a width."""
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _ast_length(config: SkillNetConfig, patch: int) -> int:
    """Return the number of frames, including padding, that gives every token a patch."""
    steps = -(-config.max_frames // config.mel_stack)
    return (steps - 1) * config.mel_stack + patch
