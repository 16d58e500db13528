"""Merging of models whose common weights were trained apart, by their task vectors (TIES).

A task vector is a trained model minus its base. :class:`TiesJoin` follows Yadav et al. 2023 ("TIES-
Merging"), with the strength 1 that they advise without validation rows:

trim    each vector keeps the entries of largest magnitude, a fifth of all
elect   the sign of each weight is that of the sum over the vectors
merge   the mean of the entries that have this sign is added to the base

:func:`skillnet.model_merging.merge_models` calls it for the files that differ between the models.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skillnet.model_merging import MergeParent, MergePlan

#: Fraction of the entries of a task vector that stay.
KEPT_FRACTION = 0.2


class TiesJoin:
    """Join of files by trimmed task vectors that agree in sign.

    Args:
        base: the model that all others were trained from.
        plan: files that differ between the others.
    """

    def __init__(self, base: MergeParent, plan: MergePlan) -> None:
        self._base = base
        parents = {id(p): p for file in plan.averaged for p in plan.origins[file]}
        #: Identity of a parent -> smallest magnitude that it keeps.
        self._least = {
            key: self._find_least(parent, plan.averaged) for key, parent in parents.items()
        }

    def _find_least(self, parent: MergeParent, files: Sequence[str]) -> float:
        # The magnitude is one number for the whole model: layers may change unequally.
        sizes = torch.cat(
            [
                change.abs().flatten()
                for file in files
                for change in self._subtract_base(file, parent).values()
            ]
        )
        kept = max(round(KEPT_FRACTION * len(sizes)), 1)
        return float(torch.topk(sizes, kept, sorted=True).values[-1])

    def _subtract_base(self, file: str, parent: MergeParent) -> dict[str, Tensor]:
        before = self._base.read_weights(file)
        return {
            name: value.double() - before[name].double()
            for name, value in parent.read_weights(file).items()
        }

    def __call__(self, file: str, parents: Sequence[MergeParent]) -> dict[str, Tensor]:
        """Return the weights of a file.

        Args:
            file: name in the merged model.
            parents: models that have it.
        """
        vectors = [(self._subtract_base(file, p), self._least[id(p)]) for p in parents]
        merged = {}
        for name, before in self._base.read_weights(file).items():
            trimmed = torch.stack(
                [torch.where(v[name].abs() >= least, v[name], 0.0) for v, least in vectors]
            )
            agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
            total = torch.where(agrees, trimmed, 0.0).sum(0)
            merged[name] = (before.double() + total / agrees.sum(0).clamp(min=1)).to(before.dtype)
        return merged
