"""Vocabulary of a model: the tokenizer of its token ids, and the names of its outputs.

Ids are numbers, so ids of another tokenizer or of other classes raise no error by themselves. A
saved model therefore records its vocabulary, and readers compare it with the vocabulary of a corpus
(:mod:`pipelines.training.runs.vocabulary_match`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelVocabulary:
    """Meaning of a model's ids.

    Args:
        tokenizer: SHA-256 of the ``tokenizer.json`` that made its token ids; None if it reads no
            tokens, or if it was not trained on a prepared corpus.
        outputs: task -> names of its classes, or of its CTC symbols from id 1, in the order of
            their ids. Tasks without names are left out.
        scales: task of a regression -> mean and deviation of its training values.
    """

    tokenizer: str | None = None
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def restrict_to(self, tasks: Collection[str]) -> "ModelVocabulary":
        """Return the same vocabulary without the outputs of other tasks."""
        kept = {task: self.outputs[task] for task in tasks if task in self.outputs}
        scales = {task: self.scales[task] for task in tasks if task in self.scales}
        return ModelVocabulary(self.tokenizer, kept, scales)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, ready for JSON."""
        outputs = {task: list(names) for task, names in self.outputs.items()}
        scales = {task: list(scale) for task, scale in self.scales.items()}
        given = {"tokenizer": self.tokenizer, "outputs": outputs}
        return given | {"scales": scales} if scales else given


def parse_vocabulary(values: Any) -> ModelVocabulary:
    """Build a vocabulary from plain types, the inverse of :meth:`ModelVocabulary.to_dict`.

    Raises:
        ValueError: a key is missing, unknown or of another type.
    """
    if not isinstance(values, dict) or values.keys() - {"scales"} != {"tokenizer", "outputs"}:
        raise ValueError("vocabulary: expected the keys tokenizer and outputs")
    tokenizer, outputs = values["tokenizer"], values["outputs"]
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise ValueError("vocabulary.tokenizer: expected a SHA-256 or null")
    if not isinstance(outputs, dict):
        raise ValueError("vocabulary.outputs: expected the names of each task")
    for task, names in outputs.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"vocabulary.outputs.{task}: expected a list of names")
    scales = values.get("scales", {})
    if not isinstance(scales, dict):
        raise ValueError("vocabulary.scales: expected mean and deviation of each task")
    return ModelVocabulary(
        tokenizer,
        {task: tuple(names) for task, names in outputs.items()},
        {task: parse_scale(scale, f"vocabulary.scales.{task}") for task, scale in scales.items()},
    )


def parse_scale(values: Any, where: str) -> tuple[float, float]:
    """Return mean and deviation of a regression's values from plain types.

    Args:
        values: a list of two numbers.
        where: key, for the message.

    Raises:
        ValueError: they are no finite numbers, or the deviation is not above 0.
    """
    is_pair = isinstance(values, list) and len(values) == 2
    if not is_pair or not all(type(each) in (int, float) for each in values):
        raise ValueError(f"{where}: expected mean and deviation")
    mean, deviation = map(float, values)
    if not (math.isfinite(mean) and math.isfinite(deviation) and deviation > 0):
        raise ValueError(f"{where}: expected a finite mean and a deviation above 0")
    return mean, deviation


def find_order(names: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Return the position in ``known`` of each name; None unless both hold the same names."""
    positions = {name: position for position, name in enumerate(known)}
    # Repeated names have no unique position.
    is_same = len(names) == len(known) == len(positions) and set(names) == positions.keys()
    return [positions[name] for name in names] if is_same else None
