"""Texts and code: tokens of one vocabulary.

Shapes: B batch, T tokens, D model width.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.modalities.tensors import (
    PAD,
    Batch,
    ModalityTensors,
    RowAugmentation,
    RowMasking,
    Tokens,
    add_targets,
    build_stem_norm,
    draw_lengths,
    make_positions,
    sample_mask,
)
from skillnet.modality import BUILT_IN_MODALITIES

#: Ids of the mask token, and of the first word; the ids below are padding, unknown, mask and class.
MASK_TOKEN, FIRST_WORD = 2, 4
#: Fractions of the masked tokens that become the mask token, and another word (BERT).
TO_MASK, TO_RANDOM = 0.8, 0.1


class TokenStem(nn.Module):
    """Token embedding of text and code. Batch: ``tokens`` (B, T) int64; 0 is padding.

    With ``bigram_buckets``, a hashed table adds an embedding of each pair of adjacent tokens (the
    idea of fastText's n-gram features).
    """

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.max_tokens = config.max_tokens
        self.buckets = config.bigram_buckets
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.buckets:
            self.bigram = nn.Embedding(self.buckets, config.dim)
            nn.init.normal_(self.bigram.weight, std=0.02)
        self.position = make_positions(config.max_tokens, config.dim)
        # Text and code share the stem; these vectors tell the layers which one is read.
        self.modality = nn.ParameterDict(
            {name: torch.zeros(config.dim) for name in _list_readers(config)}
        )
        self.norm = build_stem_norm(config)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        tokens_BT = batch["tokens"]
        T = tokens_BT.shape[1]
        if self.max_tokens < T:
            raise ValueError(
                f"a sequence of {T} tokens is longer than model.max_tokens {self.max_tokens}; "
                "truncate it or raise model.max_tokens"
            )
        mask_BT = tokens_BT != PAD
        x_BTD = self.embedding(tokens_BT)
        if self.buckets:
            following = F.pad(tokens_BT[:, 1:], (0, 1))
            # Multiplicative hash. 1_000_003 is prime, so pairs spread over the buckets.
            x_BTD = x_BTD + self.bigram((tokens_BT * 1_000_003 + following) % self.buckets)
        x_BTD = x_BTD + self.position[:T] + self.modality[modality]
        return self.norm(x_BTD), mask_BT


def _list_readers(config: SkillNetConfig) -> list[str]:
    """Return the modalities that read tokens: text, code and those of the tasks."""
    built_in = [each.name for each in BUILT_IN_MODALITIES.values() if each.reads_tokens]
    plans = (plan for task in config.tasks.values() for plan in task.towers.values())
    others = {plan.modality for plan in plans if plan.stem == "token"} - set(built_in)
    return [*built_in, *sorted(others)]


class TokenTensors(ModalityTensors):
    """Tensor half of sequences of tokens."""

    stem_class = TokenStem
    pad_to = 8
    # Rows of about 24 tokens with augmentation (benchmarks/results/2026-11-25-stream.csv).
    seconds_per_element = 1 / 901_300 / 24

    def find_longest(self, config: SkillNetConfig) -> int:
        return config.max_tokens

    def count_tokens(self, config: SkillNetConfig, length: Any = None) -> Any:
        return config.max_tokens if length is None else length

    def count_classes(self, config: SkillNetConfig) -> int:
        return config.vocab_size

    def count_stem_flops(self, config: SkillNetConfig, stem: nn.Module, length: int | None) -> int:
        return 0  # a table has no products

    def make_example(
        self,
        config: SkillNetConfig,
        rows: int,
        length: int | None = None,
        draw: Generator | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Batch:
        longest = length or config.max_tokens
        if draw is None:
            return {"tokens": torch.ones(rows, longest, dtype=torch.long)}
        tokens_BT = torch.randint(1, config.vocab_size, (rows, longest), generator=draw)
        is_real = torch.arange(longest) < draw_lengths(longest, rows, draw)[:, None]
        return {"tokens": tokens_BT * is_real}

    def make_batch(self, values: np.ndarray, lengths: np.ndarray | None = None) -> Batch:
        return {"tokens": torch.from_numpy(values.astype(np.int64, copy=False))}

    def count_units(self, batch: Batch) -> Tensor:
        return (batch["tokens"] != PAD).sum(1)

    def find_dropout(self, settings: Any) -> float:
        """Return the fraction of the tokens that the augmentation hides."""
        raise NotImplementedError

    def augment(
        self, values: np.ndarray, lengths: np.ndarray | None, change: RowAugmentation
    ) -> tuple[np.ndarray, np.ndarray | None]:
        assert lengths is not None
        share = self.find_dropout(change.settings)
        return drop_tokens(values, lengths, share, change.random, change.limit), lengths

    def mask(self, inputs: Batch, masking: RowMasking, random: Any) -> tuple[Batch, Batch]:
        """Mask tokens as BERT does: 80 % become the mask token and 10 % another word.

        The values (M,) are the original tokens.
        """
        tokens = inputs["tokens"].numpy()
        T = tokens.shape[1]
        chance, fate, word = (
            random.uniform(f"mask {purpose}", masking.longest)[:, :T]
            for purpose in ("place", "fate", "word")
        )
        masked = sample_mask(chance, (tokens != 0).sum(1), masking.share)
        words = masking.vocab_size - FIRST_WORD
        other_word = FIRST_WORD + np.floor(word * words).astype(np.int64)
        shown = np.where(masked & (fate < TO_MASK), MASK_TOKEN, tokens)
        shown = np.where(
            masked & (fate >= TO_MASK) & (fate < TO_MASK + TO_RANDOM), other_word, shown
        )
        flags = torch.from_numpy(masked)
        return add_targets({"tokens": torch.from_numpy(shown)}, flags, inputs["tokens"])


class TextTensors(TokenTensors):
    """Tensor half of texts."""

    def find_dropout(self, settings: Any) -> float:
        return settings.token_dropout


class CodeTensors(TokenTensors):
    """Tensor half of code."""

    def find_dropout(self, settings: Any) -> float:
        return settings.code_dropout


def drop_tokens(
    tokens_BT: np.ndarray, lengths_B: np.ndarray, share: float, random: Any, longest: int
) -> np.ndarray:
    """Replace a fraction of the tokens by the mask token; the last real token of a row stays.

    Args:
        tokens_BT: token ids.
        lengths_B: real tokens of each row.
        share: fraction to replace.
        random: random numbers of these rows.
        longest: largest number of tokens of any row; it does not depend on the batch.

    Returns:
        (B, T) token ids.
    """
    if share <= 0:
        return tokens_BT
    width = tokens_BT.shape[1]
    chance = random.uniform("tokens", longest)[:, :width]
    hit = (chance < share) & (np.arange(width) < lengths_B[:, None] - 1)
    return np.where(hit, MASK_TOKEN, tokens_BT)
