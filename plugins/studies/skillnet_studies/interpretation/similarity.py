"""Similarity of skills by layer: of their outputs on real inputs, and of their weights.

Linear centred kernel alignment (source: Kornblith et al., "Similarity of Neural Network
Representations Revisited", ICML 2019) compares two skills' outputs on the same tokens. It is 1 if
one output is the other rotated and scaled, and near 0 for unrelated outputs.

A module receives its usual input, from the task with its own plan; each skill is then computed
alone on that input. Equal inputs make outputs similar even without training. An untrained skill is
therefore included as a baseline, and a similarity is meaningful if it is above this baseline.

The entry point is :func:`measure_skill_similarity`.

Shapes: B rows, T tokens of a row, n tokens in total, D model width.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.training.evaluation.inference import batches_by_length, split_inputs
from skillnet.encoder import EncoderLayer
from skillnet.layers import SkillAttention, SkillFeedForward
from skillnet.model import SkillNet
from skillnet.model_merging import add_skill
from skillnet.skills import SkillPlan
from skillnet_studies.interpretation.ablation import find_measured_splits

CKA, WEIGHTS = "outputs (CKA)", "weights (cosine)"

#: Keys of a row of :func:`measure_skill_similarity`.
COLUMNS = ("measure", "modality", "task", "layer", "module", "skill", "other", "value", "tokens")

#: Name of the untrained skill that serves as baseline.
UNTRAINED = "untrained"

SkillModule = SkillAttention | SkillFeedForward
Modules = dict[tuple[int, str], SkillModule]
Pairs = dict[tuple[str, str], float | None]


def measure_skill_similarity(
    model: SkillNet,
    data: str | Path,
    tasks: Sequence[str] | None = None,
    split: str = "test",
    *,
    corpora: Mapping[str, str] | None = None,
    limits: Mapping[str, int | None] | None = None,
    tokens: int = 2048,
) -> list[dict[str, Any]]:
    """Compare all pairs of skills in every module that has skills.

    Args:
        model: a trained model.
        data: directory of prepared corpora.
        tasks: task names; the inputs of a modality come from the first task with a tower of that
            modality (queries excluded). None takes all tasks.
        split: split of the corpora.
        corpora: task -> corpus, if it is not the built-in corpus.
        limits: task -> maximum sequence length, as in training.
        tokens: minimum number of tokens per modality, without padding. At least eight times the
            model width is used, because few tokens make unrelated outputs look similar.

    Returns:
        Rows with the keys ``COLUMNS``, each pair in both orders, including :data:`UNTRAINED`;
        layers count from 1. A value is None if a skill has constant outputs or zero weights.

    Raises:
        UserError: an unknown task, or no corpus with that split.
    """
    model = _with_untrained(model)
    modules = find_skill_modules(model)
    table = []
    for (layer, module), carrier in modules.items():
        vectors = {name: _flat_weights(carrier, name) for name in model.config.skills}
        common = {"measure": WEIGHTS, "modality": "", "task": "", "layer": layer, "module": module}
        table += _build_rows(_cosines(vectors), common | {"tokens": None})
    seen: set[str] = set()
    for name, part, corpus in find_measured_splits(model, data, tasks, split, corpora):
        spec = model.config.tasks[name]
        tower = spec.row_tower
        plan = spec.towers[tower]
        # One task per modality is enough, and each costs a forward pass per skill.
        if plan.modality in seen:
            continue
        seen.add(plan.modality)
        limit = (limits or {}).get(name)
        where = f"{corpus.name}/{part.name}"
        inputs = split_inputs(part.table(), plan, model.config, where, limit=limit)
        rows = _sample_rows(inputs.lengths, max(tokens, 8 * model.config.dim))
        outputs = _collect_outputs(model, modules, plan, inputs, rows)
        for (layer, module), by_skill in outputs.items():
            common = {"measure": CKA, "modality": plan.modality, "task": name}
            common |= {"layer": layer, "module": module}
            count = len(next(iter(by_skill.values())))
            table += _build_rows(compute_linear_cka(by_skill), common | {"tokens": count})
    return table


def find_skill_modules(model: SkillNet) -> Modules:
    """Return (layer from 1, "attention" or "feedforward") -> module, of modules with skills."""
    modules: Modules = {}
    for index, layer in enumerate(model.encoder.layers):
        assert isinstance(layer, EncoderLayer)
        if layer.attention_skills:
            modules[index + 1, "attention"] = layer.attention
        if layer.feedforward_skills:
            modules[index + 1, "feedforward"] = layer.feedforward
    return modules


def compute_linear_cka(outputs: Mapping[str, Tensor]) -> Pairs:
    """Return the linear CKA of every pair of outputs.

    CKA is ||Y'X||² / (||X'X|| ||Y'Y||) of centred outputs, with Frobenius norms.

    Args:
        outputs: skill -> outputs (n, D) on the same tokens.

    Returns:
        (skill, skill) -> CKA; None if one of the outputs is constant.
    """
    # Without centring, an offset that all skills share would make them look similar.
    centred = {name: (x - x.mean(0)).float() for name, x in outputs.items()}
    own = {name: float((x.T @ x).norm()) for name, x in centred.items()}
    return {
        (one, other): float((centred[other].T @ centred[one]).norm()) ** 2 / (own[one] * own[other])
        if own[one] and own[other]
        else None
        for one, other in combinations_with_replacement(outputs, 2)
    }


def _with_untrained(model: SkillNet) -> SkillNet:
    """Return a copy with one untrained skill; the global random state is unchanged."""
    # The model of the caller must not get another skill.
    copied = copy.deepcopy(model)
    # The new weights must not change the random state of the caller.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return add_skill(copied, UNTRAINED)


@torch.no_grad()
def _collect_outputs(
    model: SkillNet, modules: Modules, plan: SkillPlan, inputs: Any, rows: np.ndarray
) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Return module -> skill -> outputs (n, D) on the tokens of some rows, without padding."""
    parts: dict[tuple[int, str], dict[str, list[Tensor]]] = {
        key: {name: [] for name in model.config.skills} for key in modules
    }
    real: list[Tensor | None] = [None]

    def listen(key: tuple[int, str]) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            x, more = arguments[0], arguments[2:]
            for name, outputs in parts[key].items():
                # Calling forward directly skips this hook.
                y = type(module).forward(module, x, module.merge(x, (name,)), *more)
                outputs.append(_take_real(y, real[0]))

        return hook

    handles = [part.register_forward_pre_hook(listen(key)) for key, part in modules.items()]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for chosen in batches_by_length(inputs.lengths[rows], 4096):
            batch = {key: x.to(device) for key, x in inputs.load_batch(rows[chosen]).items()}
            real[0] = model.stems[plan.stem](batch, plan.modality)[1]
            model.tokens(batch, plan)
    finally:
        for handle in handles:
            handle.remove()
        model.train()  # drops the cached weights of each single skill
        model.train(training)
    return {
        key: {name: torch.cat(outputs) for name, outputs in by_skill.items()}
        for key, by_skill in parts.items()
    }


def _take_real(y: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Return the outputs (n, D) of the real tokens, of padded or packed rows."""
    if mask_BT is None:
        return y.flatten(0, 1)
    # Packed tokens are in the order of the mask, and copies follow them.
    return y[: int(mask_BT.sum())] if y.dim() == 2 else y[mask_BT]


def _sample_rows(lengths: np.ndarray, tokens: int) -> np.ndarray:
    """Return random row indices (sorted) that contain at least ``tokens`` tokens."""
    order = np.random.default_rng(0).permutation(len(lengths))
    enough = int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1
    # Sorted rows read a memory-mapped split in order.
    return np.sort(order[:enough])


def _flat_weights(module: SkillModule, skill: str) -> Tensor:
    """Return all weights of a skill in a module as one vector."""
    return torch.cat([part.get(skill).detach().flatten() for part, _ in module.products])


def _cosines(vectors: Mapping[str, Tensor]) -> Pairs:
    norms = {name: float(x.norm()) for name, x in vectors.items()}
    return {
        (one, other): float(vectors[one] @ vectors[other]) / (norms[one] * norms[other])
        if norms[one] and norms[other]
        else None
        for one, other in combinations_with_replacement(vectors, 2)
    }


def _build_rows(pairs: Pairs, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per pair and order."""
    both = pairs | {(other, one): value for (one, other), value in pairs.items()}
    rows = [common | {"skill": a, "other": b, "value": value} for (a, b), value in both.items()]
    return [{column: row[column] for column in COLUMNS} for row in rows]
