"""Check of stored embeddings: unit vectors, whose products are cosine similarities."""

from pathlib import Path

import numpy as np

from skillnet_platform.errors import UserError

#: Deviation of a length from 1 that rounding can cause: bf16 has 8 bits.
TOLERANCE = 0.02
#: Vectors whose lengths are computed at once.
BLOCK_ROWS = 65_536


def check_unit_vectors(path: Path, vectors: np.ndarray, shape: tuple[int, int]) -> None:
    """Check stored embeddings.

    Args:
        path: location of the file, for the message.
        vectors: its content.
        shape: expected number and width.

    Raises:
        UserError: another shape or type, or a vector whose length is neither 1 nor 0.
    """
    if vectors.shape != shape or vectors.dtype != np.float32:
        raise UserError(
            f"{path} is damaged: it holds {vectors.shape} numbers of type {vectors.dtype}, "
            f"expected {shape} of type float32"
        )
    for start in range(0, len(vectors), BLOCK_ROWS):
        lengths = np.linalg.norm(vectors[start : start + BLOCK_ROWS], axis=1)
        # A row without any real token has the vector zero. NaN fails both comparisons.
        is_unit = (np.abs(lengths - 1) <= TOLERANCE) | (lengths == 0)
        if not is_unit.all():
            row = start + int(np.argmin(is_unit))
            raise UserError(
                f"{path} is damaged: row {row} has the length {lengths[row - start]:.3g}, "
                "so its similarities would be no cosines"
            )
