"""Weights of a library's checkpoint, taken one by one until none is left.

A weight that no mapping takes would be lost silently, and the outputs would differ. So every
weight is taken, or its name is known as a part that SkillNet does not use, such as a head.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from skillnet.serialization import load_tensors

#: Longest list of weights in a message.
MAX_LISTED = 8


class CheckpointWeights:
    """Weights of a checkpoint that were not taken yet.

    Args:
        folder: directory of the checkpoint, for messages.
        tensors: name -> weight.
        prefixes: beginnings of the encoder's weights in different classes of the library; the first
            that occurs is removed.
        unused: regular expression of names that no encoder reads: heads, poolers, decoders.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, Tensor], prefixes: tuple[str, ...], unused: str
    ) -> None:
        self.folder = folder
        prefix = next((p for p in prefixes if any(n.startswith(p) for n in tensors)), "")
        self._rest = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if not re.match(unused, name) and not re.match(unused, name.removeprefix(prefix))
        }

    def take(self, *names: str) -> Tensor:
        """Return a weight and remove it from those that are left.

        Args:
            *names: spellings of its name in versions of the library.

        Raises:
            ValueError: the checkpoint has none of the names.
        """
        found = self.find(*names)
        if found is None:
            raise ValueError(
                f"{self.folder}: the checkpoint has no weight {' or '.join(names)}; it has "
                f"{self._list_rest()}. Give a checkpoint that the library has saved whole"
            )
        return found

    def find(self, *names: str) -> Tensor | None:
        """Return a weight as :meth:`take` does, or None if the checkpoint has none of the names."""
        name = next((name for name in names if name in self._rest), None)
        return None if name is None else self._rest.pop(name)

    def require_empty(self) -> None:
        """Raise ValueError, naming them with their shapes, if weights were not taken."""
        if self._rest:
            raise ValueError(
                f"{self.folder}: SkillNet's layers have no place for the weights "
                f"{self._list_rest()}, so its outputs would differ. Give a checkpoint without them"
            )

    def _list_rest(self) -> str:
        shapes = [f"{name} {tuple(value.shape)}" for name, value in sorted(self._rest.items())]
        more = f" and {len(shapes) - MAX_LISTED} more" if len(shapes) > MAX_LISTED else ""
        return (", ".join(shapes[:MAX_LISTED]) or "no other weights") + more


def read_checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all safetensors files of a folder, in float32, or float64 if one weight is.

    Integers are no weights: older versions of transformers saved ``position_ids``, which later
    ones leave out. A quantized weight is missed when its name is taken.

    Raises:
        ValueError: a file is damaged, or holds other than finite floating-point numbers.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_tensors(file, drops_integers=True)
    is_double = any(value.dtype == torch.float64 for value in tensors.values())
    return {k: v.to(torch.float64 if is_double else torch.float32) for k, v in tensors.items()}


def reorder_rows(embedding_VD: Tensor, rows: Sequence[int | None]) -> Tensor:
    """Return an embedding with a row for each token of ours.

    Args:
        embedding_VD: rows of the checkpoint's tokens.
        rows: for each token id of ours the id of the checkpoint; None gets the mean of all rows.

    Raises:
        ValueError: an id is beyond the embedding.
    """
    known = [row for row in rows if row is not None]
    if max(known, default=0) >= len(embedding_VD):
        raise ValueError(
            f"the tokenizer has the id {max(known)}, the checkpoint {len(embedding_VD)} "
            "embeddings; give the tokenizer of the checkpoint"
        )
    mean_D = embedding_VD.mean(0)
    return torch.stack([mean_D if row is None else embedding_VD[row] for row in rows])
