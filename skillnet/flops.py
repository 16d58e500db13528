"""TODO: skillnet.flops."""

from collections.abc import Mapping

import torch
from torch import Tensor

from skillnet.config import SkillNetConfig
from skillnet.encoder import Encoder, EncoderLayer
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.skills import SkillPlan, find_task
from skillnet.stems import LogMelStem, PatchStem, TokenStem, TubeletStem, masked_outputs


def task_flops(
    model: SkillNet, task: str, lengths: Mapping[str, int] | None = None
) -> tuple[int, int]:
    """(operations, tokens) of one example of a SkillNet's task."""
    spec = find_task(task, model.config.tasks)
    config, flops, tokens = model.config, 0, 0
    for tower, plan in spec.towers.items():
        tower_flops, tower_tokens = _flops(model, plan, (lengths or {}).get(tower))
        flops, tokens = flops + tower_flops, tokens + tower_tokens
        outputs = {
            "classification": spec.outputs,
            "ctc": tower_tokens * (spec.outputs + 1),
            "retrieval": config.embedding_dim,
            "masked": tower_tokens * _masked_outputs(config, plan),
        }[spec.objective]
        flops += 2 * config.dim * outputs
    return flops, tokens


def _masked_outputs(config: SkillNetConfig, plan: SkillPlan) -> int:
    """Outputs of the layers of a masked task's head, at one token; counted at every token."""
    if plan.stem == "token":
        return config.dim + config.vocab_size
    return masked_outputs(config, plan.modality)


def count_flops(
    model: TaskModel, task: str, lengths: Mapping[str, int] | None = None
) -> tuple[int, int]:
    """(operations, tokens) of one example of a task of any system, counted by torch.

    Runs the task once on an example of the given lengths.
    """
    from torch.utils.flop_counter import FlopCounterMode

    spec = find_task(task, model.config.tasks)
    towers = {
        tower: _example(model, plan, (lengths or {}).get(tower))
        for tower, plan in spec.towers.items()
    }
    training = model.training
    model.eval()
    # Without gradients the counter's tracker stumbles over a weight that a module is given as an
    # argument, as the head of masked tokens is given the embedding.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(task, towers)
    tokens = 0
    with torch.no_grad():
        for tower, batch in towers.items():
            tokens += model.tower_tokens(task, tower, batch)[0].shape[1]
    model.train(training)
    return counter.get_total_flops(), tokens


def _example(model: TaskModel, plan: SkillPlan, length: int | None) -> dict[str, Tensor]:
    """A batch of one row that a plan can read; its values do not matter."""
    config, device = model.config, next(model.parameters()).device
    if plan.modality in ("text", "code"):
        return {"tokens": torch.ones(1, length or config.max_tokens, dtype=torch.long).to(device)}
    if plan.modality == "sound":
        frames = length or config.max_frames
        return {
            "log_mel": torch.zeros(1, frames, config.n_mels, device=device),
            "frames": torch.tensor([frames], device=device),
        }
    if plan.modality == "image":
        size = config.image_size
        return {"pixels": torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device)}
    shape = (1, config.video_frames, config.video_size, config.video_size, 1)
    return {"frames": torch.zeros(shape, dtype=torch.uint8, device=device)}


def _flops(model: SkillNet, plan: SkillPlan, length: int | None) -> tuple[int, int]:
    """(operations, tokens) of one example's way through stem, encoder and pooling."""
    config, stem, dim = model.config, model.stems[plan.stem], model.config.dim
    if isinstance(stem, TokenStem):
        tokens, flops = length or config.max_tokens, 0
    elif isinstance(stem, LogMelStem):
        frames = length or config.max_frames
        tokens = -(-frames // config.mel_stack)
        flops = (
            2
            * dim
            * (
                frames * config.n_mels * stem.first.kernel_size[0]
                + tokens * dim * stem.second.kernel_size[0]
            )
        )
    elif isinstance(stem, PatchStem | TubeletStem):
        tokens = stem.position.shape[0]
        flops = 2 * tokens * stem.project.in_features * dim
    else:  # a stem of a third party
        raise TypeError(f"no cost is known for {type(stem).__name__}")
    return flops + _encoder_flops(model.encoder, plan, tokens), tokens


def _encoder_flops(encoder: Encoder, plan: SkillPlan, tokens: int) -> int:
    flops = 0
    for layer in encoder.layers:
        assert isinstance(layer, EncoderLayer)
        dim = layer.attention.out.weight.shape[0]
        flops += 2 * tokens * 4 * dim * dim
        flops += 2 * 2 * tokens * tokens * dim
        flops += layer.feedforward.flops(
            tokens, len(plan.skills) if layer.feedforward_skills else 1
        )
    return flops
