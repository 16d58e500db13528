"""Rows of one task as batches: which splits they come from, columns, augmentation, masks, targets.

Shapes: B rows, T tokens, L symbols.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipelines.config.data import AugmentConfig, MaskConfig
from pipelines.config.run import TaskTraining
from pipelines.loading import augment, masking
from pipelines.loading.audio_units import SoundUnits, units_of
from pipelines.loading.augment import Draws
from pipelines.loading.shard_table import HeldRows
from pipelines.shards.columns import FixedColumn, NestedRaggedColumn, RaggedColumn
from skillnet.config import SkillNetConfig
from skillnet.skills import SkillPlan, Task
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.shards.dataset import PreparedCorpus

Kind = TypeVar("Kind", FixedColumn, RaggedColumn, NestedRaggedColumn)

#: A task's split of this name stands for the splits that a corpus allows for pretraining.
PRETRAINING = "pretraining"

#: Sequences are padded to a multiple of this, for even kernels and few shapes.
PAD_TO = 8


def splits_of(corpus: "PreparedCorpus", named: str) -> tuple[str, ...]:
    """Splits that a task's ``split`` names: itself, or what pretraining may read of the corpus.

    Raises:
        UserError: the corpus has no such split, or allows none for pretraining.
    """
    if named == PRETRAINING:
        allowed = corpus.manifest.get("pretraining", ())
        found = tuple(name for name in allowed if name in corpus.splits)
        if not found:
            raise UserError(
                f"corpus {corpus.name} names no split for pretraining in its manifest; prepare it "
                f"again, or name one of {', '.join(corpus.splits)}"
            )
        return found
    if named not in corpus.splits:
        raise UserError(
            f"corpus {corpus.name} has no split {named!r}; it has {', '.join(corpus.splits)}"
        )
    return (named,)


class TaskRows:
    """Rows of one task's split as batches: columns, towers and targets.

    Args:
        name: task name.
        task: its objective and towers.
        corpus: where its rows are.
        model: sizes that rows are cut to.
        settings: split, longest sequence, choice of captions.
        masks: what a masked task hides.

    Raises:
        UserError: no such split, missing columns, a corpus of another modality.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        corpus: "PreparedCorpus",
        model: SkillNetConfig,
        settings: TaskTraining,
        masks: MaskConfig | None = None,
    ) -> None:
        max_length = settings.max_length
        splits = splits_of(corpus, settings.split)
        self.name, self.task, self.where = name, task, f"{corpus.name}/{'+'.join(splits)}"
        self.count = sum(corpus.splits[split].rows for split in splits)
        if not self.count:
            raise UserError(f"{self.where} has no rows; prepare the corpus again")
        self.held = HeldRows([corpus.splits[split] for split in splits], self.where)
        own = "candidate" if task.objective == "retrieval" else "input"
        self.plan: SkillPlan = task.towers[own]
        self.own = own
        if corpus.modality != self.plan.modality:
            raise UserError(
                f"task {name} reads {self.plan.modality}, but corpus {corpus.name} holds "
                f"{corpus.modality}; set tasks.{name}.corpus to one of that modality"
            )
        limit = {"text": model.max_tokens, "code": model.max_tokens, "sound": model.max_frames}
        self.limit = min(
            limit.get(self.plan.modality, 1 << 30), max_length if max_length else 1 << 30
        )
        if task.objective == "ctc" and "max_seconds" in corpus.manifest["preprocessing"]:
            self._refuse_cropping(corpus)
        self._deviation = float(corpus.manifest["preprocessing"].get("deviation", 1.0))
        self._model, self._first_caption = model, settings.first_caption_prob
        tokenizer = corpus.manifest.get("tokenizer") or {}
        words = int(tokenizer.get("vocab_size", model.vocab_size))
        self.views = settings.views
        if self.views and {plan.modality for plan in task.towers.values()} != {self.plan.modality}:
            raise UserError(
                f"tasks.{name}.views needs a retrieval task whose towers both read "
                f"{self.plan.modality}: a row is compared with itself"
            )
        masks = masks or MaskConfig()
        if self.views:
            masks = masks.for_views()
        self._hide = masking.Hider(model, masks, words, self.limit, self._units(corpus))

    def _refuse_cropping(self, corpus: "PreparedCorpus") -> None:
        """A transcript asks for all of its recording: raise UserError where the end is cut off."""
        if 100 * float(corpus.manifest["preprocessing"]["max_seconds"]) <= self.limit:
            return  # none is longer: nothing has to be read for it
        self.held.hold()
        longest = int(self._ragged("log_mel").lengths().max())
        if longest > self.limit:
            raise UserError(
                f"{self.where}: recordings of up to {longest} frames, but {self.limit} are read of "
                f"one; set model.max_frames to {longest} or more (and tasks.{self.name}.max_length "
                f"likewise, where it is set), or prepare with --options.{corpus.name}.max_seconds "
                f"{self.limit / 100:g}"
            )

    def _units(self, corpus: "PreparedCorpus") -> SoundUnits | None:
        count = self._model.sound_units
        if not count or self.plan.modality != "sound" or self.task.objective != "masked":
            return None
        return units_of(corpus, splits_of(corpus, PRETRAINING), self._model.mel_stack, count)

    def lengths(self, rows: np.ndarray | None = None) -> np.ndarray | None:
        """(rows,) length of the sequence of each of these rows, or of all; none for pictures and
        clips. Opens the shards that it needs."""
        column = {"text": "tokens", "code": "tokens", "sound": "log_mel"}.get(self.plan.modality)
        if column is None:
            return None
        if rows is None:
            self.held.hold()
            return np.minimum(self._ragged(column).lengths(), self.limit)
        self.held.add(rows)
        return np.minimum(self._ragged(column).lengths(self.held.local(rows)), self.limit)

    def load(
        self,
        rows: np.ndarray,
        draws: Draws | None = None,
        config: AugmentConfig | None = None,
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """(towers, targets) of the named rows.

        Args:
            rows: (B,) row numbers.
            draws: random numbers of these rows; none takes rows as they are, cropped at their
                end, with the first caption.
            config: augmentation; used with ``draws``.
        """
        self.held.add(rows)
        if self.views:
            return self._two_views(rows, draws or Draws(("views",), len(rows), slice(None)), config)
        if self.task.objective == "masked":
            return self._masked(rows, draws or Draws(("masks",), len(rows), slice(None)), config)
        towers = {self.own: self.inputs(rows, draws, config)}
        if self.task.objective == "retrieval":
            towers["query"] = self._queries(rows, draws, config)
            return towers, {"groups": _tensor(self._fixed("group").take(self.held.local(rows)))}
        if self.task.objective == "classification":
            labels = self._fixed("label").take(self.held.local(rows))
            if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < self.task.outputs:
                raise UserError(
                    f"{self.where}: label {int(labels.max())} does not fit task {self.name} with "
                    f"model.tasks.{self.name}.outputs {self.task.outputs}"
                )
            return towers, {"labels": _tensor(labels)}
        symbols, lengths = self._ragged("symbols").take(self.held.local(rows))
        return towers, {"symbols": _tensor(symbols), "symbol_lengths": _tensor(lengths)}

    def inputs(
        self, rows: np.ndarray, draws: Draws | None = None, config: AugmentConfig | None = None
    ) -> dict[str, Tensor]:
        """What the tower of the corpus' own modality reads of the named rows; see ``load``."""
        modality = self.plan.modality
        self.held.add(rows)
        rows = self.held.local(rows)
        if modality in ("image", "video"):
            name = "pixels" if modality == "image" else "frames"
            x = self._fixed(name).take(rows)
            if draws is None or config is None:
                return {name: torch.from_numpy(x)}
            change = augment.pictures if modality == "image" else augment.clips
            return {name: change(x, config, draws)}
        crop = draws.uniform("crop") if draws is not None else None
        if modality == "sound":
            mel, frames = self._ragged("log_mel").take(rows, self.limit, crop)
            if draws is not None and config is not None:
                mel, frames = augment.recordings(
                    mel, frames, config, draws, self._model.max_frames, self._deviation
                )
            return {"log_mel": torch.from_numpy(mel), "frames": _tensor(frames)}
        tokens, lengths = self._ragged("tokens").take(rows, self.limit, crop, PAD_TO)
        if draws is not None and config is not None:
            share = config.token_dropout if modality == "text" else config.code_dropout
            tokens = augment.drop_tokens(tokens, lengths, share, draws, self.limit)
        return {"tokens": _tensor(tokens)}

    def _masked(
        self, rows: np.ndarray, draws: Draws, config: AugmentConfig | None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Augmented rows with a part of them hidden, and what was there."""
        if config is not None:
            # What hides a part of the input itself would be asked for as if it were there.
            config = replace(
                config, time_masks=0, frequency_masks=0, token_dropout=0.0, code_dropout=0.0
            )
        inputs = self.inputs(rows, draws, config)
        inputs, targets = self._hide(self.plan.modality, inputs, draws)
        return {self.own: inputs}, targets

    def _two_views(
        self, rows: np.ndarray, draws: Draws, config: AugmentConfig | None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Each row twice, changed and hidden in part by draws of its own."""
        towers = {}
        for tower in ("query", "candidate"):
            own = draws.branch(tower)
            hidden, _ = self._hide(self.plan.modality, self.inputs(rows, own, config), own)
            del hidden["masked"]
            towers[tower] = hidden
        # A corpus' groups say which rows are alike, as labels do: here a row is alike to itself.
        return towers, {"groups": _tensor(rows)}

    def _queries(
        self, rows: np.ndarray, draws: Draws | None, config: AugmentConfig | None
    ) -> dict[str, Tensor]:
        column = self._nested("caption_tokens")
        local = self.held.local(rows)
        counts, picked = column.counts(local), column.first(local)
        if counts.size and not counts.min():
            row = int(rows[int(counts.argmin())])
            raise UserError(f"{self.where}: row {row} has no caption to search with")
        if draws is not None:
            chance, choice = draws.uniform("caption", 2).T
            place = np.floor(choice * counts).astype(np.int64)
            picked = picked + np.where(chance < self._first_caption, 0, place)
        tokens, lengths = column.inner.take(picked, self._model.max_tokens, None, PAD_TO)
        if draws is not None and config is not None:
            longest = self._model.max_tokens
            tokens = augment.drop_tokens(tokens, lengths, config.caption_dropout, draws, longest)
        return {"tokens": _tensor(tokens)}

    def _fixed(self, name: str) -> FixedColumn:
        return self._as(name, FixedColumn)

    def _ragged(self, name: str) -> RaggedColumn:
        return self._as(name, RaggedColumn)

    def _nested(self, name: str) -> NestedRaggedColumn:
        return self._as(name, NestedRaggedColumn)

    def _as(self, name: str, kind: type[Kind]) -> Kind:
        column = self.held.column(name)
        if not isinstance(column, kind):
            raise UserError(
                f"{self.where}: column {name!r} holds {self.held.kind(name)}, "
                f"which task {self.name} cannot read"
            )
        return column


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.int64, copy=False))
