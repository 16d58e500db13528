"""Linear path of a retrieval task: from the input of a tower to the retrieval space.

An encoder that learns from few pairs forgets what its input was. Texts and functions that share
rare words, or drawings with the same shapes, are then no nearer than others. A linear path beside
the encoder keeps it (the wide part of Wide & Deep, Cheng et al. 2016; the features are ours).
``model.tasks.<task>.linear_path`` adds it to a task.

Shapes: B batch, T tokens, D model width, E width of the retrieval space, V tokens of the
vocabulary, S cells per side of a grid.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.precision import to_wide_float
from skillnet.skills import Task
from skillnet.stems import PAD, scale_to_signed

#: Maximum number of cells per side of an image's grid. Coarse cells match drawings of two artists.
MAX_GRID = 12
#: Factor of learned term weights, whose exponential is used. With the common learning rate the
#: weights would stay near 1 in a few hundred steps.
TERM_SCALE = 10.0


class LinearPath(nn.Module):
    """Linear maps from texts, functions and images to unit vectors (B, E).

    Text and code: the sum of the token embeddings of the stem, each with the learned weight of its
    token. Both towers use the same weights and the same matrix. Texts with common tokens are
    therefore similar before training. Image: the mean colours of a grid of cells, relative to their
    mean.

    Args:
        config: sizes of the model.
        task: retrieval between towers of text, code or images.
    """

    def __init__(self, config: SkillNetConfig, task: Task) -> None:
        super().__init__()
        kinds = {plan.stem for plan in task.towers.values()}
        width = config.embedding_dim
        if "token" in kinds:
            self.term_weight = nn.Embedding(config.vocab_size, 1)
            nn.init.zeros_(self.term_weight.weight)
            self.tokens = nn.Linear(config.dim, width, bias=False)
        if "patch" in kinds:
            self.side = find_grid_side(config.image_size)
            self.pixels = nn.Linear(3 * self.side**2, width, bias=False)
        # Learned as a logarithm, so that the path keeps its sign; one axis, see RetrievalHead.
        self.log_gain = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Mapping[str, Tensor], embedding: Callable[[], Tensor]) -> Tensor:
        """Return vectors (B, E) of length ``exp(log_gain)``.

        Args:
            inputs: ``tokens`` (B, T) or ``pixels`` (B, H, W, 3) of a tower.
            embedding: returns the token embedding (V, D) of the tower.
        """
        if "tokens" in inputs:
            y_BE = self.tokens(self._sum_tokens(inputs["tokens"], embedding()))
        else:
            y_BE = self.pixels(self._average_cells(inputs["pixels"]))
        return self.log_gain.exp() * F.normalize(to_wide_float(y_BE), dim=-1)

    def _sum_tokens(self, tokens_BT: Tensor, embedding_VD: Tensor) -> Tensor:
        weights_BT1 = (TERM_SCALE * self.term_weight(tokens_BT)).exp()
        weights_BT1 = weights_BT1 * (tokens_BT != PAD)[..., None]
        # Not a matrix product: autocast would round the sum to bf16.
        return (F.embedding(tokens_BT, embedding_VD) * weights_BT1).sum(1)

    def _average_cells(self, pixels_BHWC: Tensor) -> Tensor:
        B, size = pixels_BHWC.shape[:2]
        cell = size // self.side
        x = scale_to_signed(pixels_BHWC, self.pixels.weight.dtype)
        means_BN = x.reshape(B, self.side, cell, self.side, cell, 3).mean((2, 4)).flatten(1)
        # Shapes, not the brightness of the whole image, decide about similarity.
        return F.normalize(means_BN - means_BN.mean(1, keepdim=True), dim=-1)


def find_grid_side(size: int) -> int:
    """Return the number of cells per side: the largest divisor of ``size`` up to ``MAX_GRID``.

    Args:
        size: pixels per side of an image.
    """
    return next(side for side in range(MAX_GRID, 0, -1) if size % side == 0)


def count_linear_flops(config: SkillNetConfig, modality: str) -> int:
    """Return the operations of the path for one row of a tower.

    Args:
        config: sizes of the model.
        modality: medium of the tower.
    """
    inputs = 3 * find_grid_side(config.image_size) ** 2 if modality == "image" else config.dim
    return 2 * inputs * config.embedding_dim
