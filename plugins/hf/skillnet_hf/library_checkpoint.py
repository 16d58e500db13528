"""Conversion of a checkpoint of transformers or timm to a dense model of ours.

:func:`convert_checkpoint` is the entry point; ``--from`` of a training calls it. The dense model
has the outputs of the library's encoder, and one head without values, which no run reads.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from skillnet.baselines.dense import DenseModel
from skillnet.config import SkillNetConfig
from skillnet.modalities.tensors import PAD
from skillnet.modality import find_modality
from skillnet.serialization import describe_error
from skillnet.skill_copies import DENSE_SKILL, LAYERS_TASK
from skillnet.skills import SkillPlan, Task
from skillnet.skipped_init import SkippedInit
from skillnet_hf.checkpoint_weights import (
    CheckpointWeights,
    read_checkpoint_tensors,
    reorder_rows,
)
from skillnet_hf.encoder_families import FAMILIES
from skillnet_hf.hf_checkpoints import read_library_config
from skillnet_hf.library_models import check_architecture

#: The only task of a converted model. It selects the stem; its head is zero.
IMPORTED_TASK = "imported"

#: Embedding of the token stem.
EMBEDDING_WEIGHT = "stems.token.embedding.weight"


def is_library_checkpoint(folder: Path) -> bool:
    """Return whether a folder looks like a checkpoint of transformers or timm, not like ours.

    Args:
        folder: any path.
    """
    if not (folder / "config.json").is_file() or (folder / "manifest.json").is_file():
        return False
    return bool({"model_type", "architecture"} & set(read_library_config(folder)))


def convert_checkpoint(folder: Path, token_rows: Sequence[int | None] | None = None) -> DenseModel:
    """Return a dense model with the weights and the outputs of a library's encoder.

    Args:
        folder: with ``config.json`` and safetensors files.
        token_rows: for each token id of ours the id of the checkpoint, None for a token that the
            checkpoint does not know: it gets the mean embedding. None keeps the ids.

    Returns:
        The model in evaluation mode, in float32, or float64 if the checkpoint is.

    Raises:
        ValueError: another family, or weights that do not fit its mapping; names and shapes.
    """
    config = read_library_config(folder)
    name = "timm" if "architecture" in config else str(config.get("model_type"))
    if name not in FAMILIES:
        raise ValueError(
            f"{folder}/config.json: no skill can start from an encoder of the type {name!r}. Give "
            f"one of the types {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    padding = config.get("pad_token_id", PAD)
    if find_modality(family.modality).reads_tokens and token_rows is None and padding != PAD:
        raise ValueError(
            f"{folder}: it pads with the id {padding}, the corpora with {PAD}. Add its "
            "tokenizer.json to the folder, and prepare the corpora with that tokenizer"
        )
    tensors = read_checkpoint_tensors(folder)
    left = CheckpointWeights(folder, tensors, family.prefixes, family.unused)
    task = Task("classification", {"input": SkillPlan((DENSE_SKILL,), family.modality)}, outputs=1)
    tasks = {IMPORTED_TASK if family.has_stem else LAYERS_TASK: task}
    try:
        if name == "timm":
            config = _read_timm_config(folder, config)
        weights, settings = family.convert(left, config)
        if token_rows is not None and EMBEDDING_WEIGHT in weights:
            weights[EMBEDDING_WEIGHT] = reorder_rows(weights[EMBEDDING_WEIGHT], token_rows)
            settings["vocab_size"] = len(token_rows)
        sizes = SkillNetConfig(skills=(DENSE_SKILL,), tasks=tasks, **settings)
        with SkippedInit():  # every weight follows, but for those that stay zero
            model = DenseModel(sizes).to(next(iter(weights.values())).dtype)
        fresh = model.load_partial(weights)
    # A configuration and shapes of another author reach code that expects the usual ones.
    except Exception as error:
        words = describe_error(error)
        raise ValueError(words if str(folder) in words else f"{folder}: {words}") from None
    for parameter in fresh:
        model.get_parameter(parameter).detach().zero_()
    return model.eval()


def _read_timm_config(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that the weights do not show, from an instance without values."""
    import timm

    name, arguments = str(values.get("architecture")), values.get("model_args", {})
    check_architecture(name, arguments)
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False, **arguments)
    block, pixels = model.blocks[0], values.get("pretrained_cfg", {})
    gelu = isinstance(block.mlp.act, torch.nn.GELU) and block.mlp.act.approximate == "none"
    return {
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": "gelu" if gelu else type(block.mlp.act).__name__,
        "qkv_bias": block.attn.qkv.bias is not None,
        "mean": pixels.get("mean"),
        "std": pixels.get("std"),
    }
