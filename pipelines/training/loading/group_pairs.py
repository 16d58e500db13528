"""Pairs of rows of one group, for retrieval whose two towers read the same modality.

:class:`GroupPairs` draws the query of a row for :mod:`pipelines.training.loading.task_dataset`.
"""

import numpy as np

from skillnet.objectives.retrieval import unique_group_ids
from skillnet_platform.errors import UserError


class GroupPairs:
    """Rows of one group, such as photographs of one product.

    Args:
        groups: (N,) group of each row; negative numbers mean a group of one row.
        location: corpus and splits, for the message.

    Raises:
        UserError: no group has two rows.
    """

    def __init__(self, groups: np.ndarray, location: str) -> None:
        ids = unique_group_ids(groups)
        self._order = np.argsort(ids, kind="stable")
        _, first, inverse, counts = np.unique(
            ids[self._order], return_index=True, return_inverse=True, return_counts=True
        )
        if not (counts > 1).any():
            raise UserError(
                f"{location}: no two rows have one group, so a row has no other one to find. "
                "Prepare the corpus with its option task: pairs; the label names the item of a row"
            )
        self._start, self._count = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        self._start[self._order], self._count[self._order] = first[inverse], counts[inverse]
        self._place = np.empty(len(ids), np.int64)
        self._place[self._order] = np.arange(len(ids)) - first[inverse]

    def draw(self, rows: np.ndarray, choice: np.ndarray | None = None) -> np.ndarray:
        """Return another row of each row's group, (B,); the row itself if it is alone.

        Args:
            rows: (B,) row numbers.
            choice: (B,) numbers in [0, 1) that choose among the others; None takes the next one.
        """
        others = np.maximum(self._count[rows] - 1, 1)
        steps = 1 if choice is None else 1 + np.floor(choice * others).astype(np.int64)
        places = (self._place[rows] + steps) % self._count[rows]
        return self._order[self._start[rows] + places]
