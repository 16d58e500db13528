"""Tiny random checkpoints of transformers and timm."""

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
}


def randomize(model: torch.nn.Module) -> Any:
    """Give norms and biases values other than 1 and 0 too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def save_checkpoint(name: str, folder: Path, **changes: Any) -> Any:
    """Write a tiny random checkpoint with the library, in float64; return its model.

    Args:
        name: family.
        folder: directory to write.
        **changes: other values of the settings below.
    """
    import timm
    import transformers

    if name == "timm":
        arguments: dict[str, Any] = {
            "img_size": 8,
            "patch_size": 4,
            "embed_dim": 12,
            "depth": 2,
            "num_heads": 3,
        }
        model: Any = randomize(
            timm.create_model("vit_base_patch16_224", num_classes=4, **arguments)
        )
        model.pretrained_cfg["mean"], model.pretrained_cfg["std"] = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
        timm.models.save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
        return model
    text: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 12, "type_vocab_size": 2}
    image: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_labels": 4}
    sound: dict[str, Any] = {"d_model": 12, "encoder_layers": 2, "encoder_attention_heads": 3,
             "encoder_ffn_dim": 20, "decoder_layers": 1, "decoder_attention_heads": 3,
             "decoder_ffn_dim": 20, "num_mel_bins": 6, "max_source_positions": 10,
             "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
             "decoder_start_token_id": 1}  # fmt: skip
    waves: dict[str, Any] = {
        "conv_dim": (8, 8),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": 40,
        "num_feat_extract_layers": 2,
        "codevector_dim": 8,
        "proj_codevector_dim": 8,
    }
    for settings in (text, image, sound, waves):
        settings |= {key: value for key, value in changes.items() if key in settings}
    config, cls = {
        "bert": (transformers.BertConfig(**SIZES, **text), "BertForMaskedLM"),
        "roberta": (
            transformers.RobertaConfig(**SIZES, **text | {"max_position_embeddings": 13},
                                       pad_token_id=0),
            "RobertaModel",
        ),
        "vit": (transformers.ViTConfig(**SIZES, **image), "ViTForImageClassification"),
        "whisper": (transformers.WhisperConfig(**sound), "WhisperForConditionalGeneration"),
        "wav2vec2": (transformers.Wav2Vec2Config(**SIZES, **waves), "Wav2Vec2ForCTC"),
        "wav2vec2-stable": (
            transformers.Wav2Vec2Config(**SIZES, **waves, do_stable_layer_norm=True),
            "Wav2Vec2ForPreTraining",
        ),
    }[name]  # fmt: skip
    model = randomize(getattr(transformers, cls)(config))
    model.save_pretrained(folder)
    return model
