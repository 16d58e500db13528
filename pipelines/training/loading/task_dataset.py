"""Dataset of one task: rows of its splits as towers and targets, augmented and masked.

Shapes: B rows, T tokens, L symbols.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.columns import (
    INPUT_COLUMNS,
    FixedColumn,
    NestedRaggedColumn,
    RaggedColumn,
)
from pipelines.data.transforms.ctc_alignment import count_alignment_tokens
from pipelines.training.config.data import AugmentConfig, MaskConfig
from pipelines.training.config.run import TaskTraining
from pipelines.training.loading import augment, masking, pixel_changes
from pipelines.training.loading.audio_units import SoundUnits, find_sound_units
from pipelines.training.loading.augment import BatchRandom
from pipelines.training.loading.group_pairs import GroupPairs
from pipelines.training.loading.input_sizes import require_pixel_sizes
from pipelines.training.loading.pixel_changes import PixelChange, PixelChanges
from pipelines.training.loading.shard_table import ShardTable
from pipelines.training.loading.task_columns import (
    PRETRAINING,
    model_id_ranges,
    resolve_splits,
    take_targets,
    tower_column,
)
from skillnet.config import SkillNetConfig
from skillnet.objectives.base import find_objective
from skillnet.skills import SkillPlan, Task
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus

ColumnT = TypeVar("ColumnT", FixedColumn, RaggedColumn, NestedRaggedColumn)
Tensors = dict[str, Tensor]
#: Tower -> tensors with stored pixels, targets, and the changes of the pixels.
StoredRows = tuple[dict[str, Tensors], Tensors, PixelChanges]

#: Sequences are padded to a multiple of this, for even kernels and few shapes.
PAD_TO = 8


class TaskDataset:
    """Rows of one task's splits as batches of towers and targets.

    Args:
        name: task name.
        task: its objective and towers.
        corpus: opened corpus of the task.
        model: sizes that rows are cropped to.
        settings: split, longest sequence, choice of captions.
        masks: masks of a masked task.

    Raises:
        UserError: no such split, missing columns, or a corpus of another modality.
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
        splits = resolve_splits(corpus, settings.split)
        self._model = model
        self.name, self.task, self.location = name, task, f"{corpus.name}/{'+'.join(splits)}"
        self.num_rows = sum(corpus.splits[split].rows for split in splits)
        if not self.num_rows:
            raise UserError(f"{self.location} has no rows; prepare the corpus again")
        self.shard_table = ShardTable(
            [corpus.splits[split] for split in splits],
            self.location,
            model_id_ranges(name, task, model),
        )
        #: Tower of the corpus' own modality.
        self.own_tower = task.row_tower
        self.plan: SkillPlan = task.towers[self.own_tower]
        if corpus.modality != self.plan.modality:
            raise UserError(
                f"task {name} reads {self.plan.modality}, but corpus {corpus.name} holds "
                f"{corpus.modality}; set tasks.{name}.corpus to one of that modality"
            )
        if task.paired_tower is not None:
            self._require_paired_rows(corpus)
        # The model's own limit applies first; the task may lower it.
        self.limit = min(self._model_limit(self.plan.modality), max_length or 1 << 30)
        #: What the task learns.
        self.objective = find_objective(task.objective)
        aligns_targets = self.objective.aligns_targets
        if aligns_targets and "max_seconds" in corpus.manifest["preprocessing"]:
            self._reject_cropping(corpus)
        #: Rows whose targets have no alignment with the model's tokens.
        self.unalignable_rows = self._count_unalignable() if aligns_targets else 0
        self._value_scale = self.objective.read_scale(corpus.manifest)
        self._deviation = float(corpus.manifest["preprocessing"].get("deviation", 1.0))
        self._first_caption_prob = settings.first_caption_prob
        tokenizer = corpus.manifest.get("tokenizer") or {}
        # Replacement words must be tokens of the model, even if the corpus knows more.
        vocab_size = min(tokenizer.get("vocab_size", model.vocab_size), model.vocab_size)
        self.views = settings.views
        if self.views and {plan.modality for plan in task.towers.values()} != {self.plan.modality}:
            raise UserError(
                f"tasks.{name}.views needs a retrieval task whose towers both read "
                f"{self.plan.modality}: a row is compared with itself"
            )
        #: Rows of one group, for a retrieval task that reads no captions.
        self._pairs: GroupPairs | None = None
        if task.has_row_pairs and not self.views:
            self._pairs = self._find_pairs()
        masks = masks or MaskConfig()
        if self.views:
            # Views are masked lightly: both must still show the same row.
            masks = masks.for_views()
        units = self._find_units(corpus)
        self._mask = masking.InputMasker(model, masks, vocab_size, self.limit, units)

    def row_lengths(self, rows: np.ndarray | None = None) -> np.ndarray | None:
        """Return the (rows,) sequence lengths of rows; None for images and videos.

        Args:
            rows: row numbers, whose shards are opened; None for all rows.
        """
        column = {"text": "tokens", "code": "tokens", "sound": "log_mel"}.get(self.plan.modality)
        if column is None:
            return None
        if rows is None:
            self.shard_table.open()
            return np.minimum(self._ragged(column).lengths(), self.limit)
        local = self._open_rows(rows)
        return np.minimum(self._ragged(column).lengths(local), self.limit)

    def load(
        self,
        rows: np.ndarray,
        random: BatchRandom | None = None,
        config: AugmentConfig | None = None,
    ) -> StoredRows:
        """Load rows as (towers, targets, changes): pixels as stored, with changes to apply.

        Args:
            rows: (B,) row numbers.
            random: random numbers of these rows; None crops rows at their end and takes the first
                caption.
            config: augmentation; used with ``random``.

        Raises:
            UserError: a column, an id or a caption does not fit the task.
        """
        local = self._open_rows(rows)
        if self.views:
            random = random or BatchRandom(("views",), len(rows), slice(None))
            return self._two_views(rows, local, random, config)
        if self.objective.hides_inputs:
            random = random or BatchRandom(("masks",), len(rows), slice(None))
            return self._masked(local, random, config)
        inputs, change = self._inputs(local, random, config)
        towers, changes = {self.own_tower: inputs}, {self.own_tower: change} if change else {}
        # Before the rows of a second tower, which may be in other shards.
        targets = self._row_targets(local)
        if self._pairs is not None or self.task.paired_tower is not None:
            others = local
            if self._pairs is not None:
                drawn = self._pairs.draw(rows, random.uniform("pair") if random else None)
                others = self._open_rows(drawn)
            branch = random.branch("query") if random else None
            towers["query"], change = self._inputs(others, branch, config, "query")
            changes |= {"query": change} if change else {}
        elif self.task.caption_tower is not None:
            towers[self.task.caption_tower] = self._queries(rows, local, random)
        return towers, targets, changes

    def _row_targets(self, local: np.ndarray) -> Tensors:
        """Targets by name, from the columns that the objective declares."""
        targets: Tensors = {}
        found = take_targets(self.task, self.shard_table.column, local, self.location)
        for name, values in found.items():
            if self._value_scale is not None:
                mean, deviation = self._value_scale
                values = (values - np.float32(mean)) / np.float32(deviation)
            is_whole = np.issubdtype(values.dtype, np.integer)
            targets[name] = _to_int64(values) if is_whole else torch.from_numpy(values)
        return targets

    def check_columns(self) -> None:
        """Check the columns and captions of the open shards, so that a run is rejected early.

        Raises:
            UserError: a column is missing or of another type or size, or a row has no caption.
        """
        self.load(np.arange(1))
        if self.task.caption_tower is not None and not self.views:
            column = self._nested("caption_tokens")
            self._require_captions(column.counts(np.arange(self.shard_table.table().num_rows)))

    def _require_captions(self, counts: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Raise UserError for the first row without a caption, of (B,) counts."""
        if counts.size and not counts.min():
            row = int(counts.argmin())
            raise UserError(
                f"{self.location}: row {row if rows is None else int(rows[row])} has no caption to "
                "search with; prepare the corpus without such rows"
            )

    def load_inputs(self, rows: np.ndarray) -> Tensors:
        """Load the inputs of the tower of the corpus' own modality, without augmentation.

        Args:
            rows: (B,) row numbers.
        """
        return self._inputs(self._open_rows(rows), None, None)[0]

    def _open_rows(self, rows: np.ndarray) -> np.ndarray:
        """(B,) numbers of rows in the open shards, after opening their shards."""
        self.shard_table.ensure_open(rows)
        return self.shard_table.to_local(rows)

    def _model_limit(self, modality: str) -> int:
        """Return the longest row of a modality that the model reads."""
        limits = {"text": self._model.max_tokens, "code": self._model.max_tokens}
        return (limits | {"sound": self._model.max_frames}).get(modality, 1 << 30)

    def _require_paired_rows(self, corpus: "PreparedCorpus") -> None:
        """Raise UserError if the rows of a corpus lack the second medium that the task reads."""
        wanted = self.task.towers["query"].modality
        found = (corpus.manifest.get("paired") or {}).get("modality")
        if found != wanted:
            media = f"{corpus.modality} and {found}" if found else f"{corpus.modality} only"
            raise UserError(
                f"task {self.name}: its towers read {wanted} and {corpus.modality}, but the rows "
                f"of {corpus.name} have {media}. Join two corpora with skillnet prepare --pair, "
                "or give one tower the modality text"
            )

    def _find_pairs(self) -> GroupPairs:
        """Read the groups of all rows, whose shards are opened."""
        local = self._open_rows(np.arange(self.num_rows))
        return GroupPairs(self._fixed("group").take(local), self.location)

    def _reject_cropping(self, corpus: "PreparedCorpus") -> None:
        """A transcript needs its complete audio: raise UserError if the end would be cropped."""
        if 100 * float(corpus.manifest["preprocessing"]["max_seconds"]) <= self.limit:
            return  # no audio is longer, so its column need not be read
        self.shard_table.open()
        longest = int(self._ragged("log_mel").lengths().max())
        if longest > self.limit:
            raise UserError(
                f"{self.location}: audio of up to {longest} frames, but the model reads "
                f"{self.limit}; set model.max_frames to {longest} or more (and "
                f"tasks.{self.name}.max_length likewise, if it is set), or prepare with "
                f"--options.{corpus.name}.max_seconds {self.limit / 100:g}"
            )

    def _count_unalignable(self) -> int:
        """Return the number of rows with more symbols than tokens; 0 for an object store.

        Raises:
            UserError: no row can be aligned, so the task would never be trained.
        """
        if self.shard_table.is_remote:
            return 0  # would download all shards before the first step
        frames = np.minimum(self._ragged("log_mel").lengths(), self.limit)
        tokens = -(-frames // self._model.mel_stack)
        self._ragged("symbols")  # names the corpus if the column is missing
        chunks = self.shard_table.table().column("symbols").chunks
        needed = np.concatenate([count_alignment_tokens(chunk) for chunk in chunks])
        count = int((needed > tokens).sum())
        if count == self.num_rows:
            raise UserError(
                f"{self.location}: each transcript has more symbols than its audio has tokens, so "
                f"task {self.name} cannot be trained; lower model.mel_stack "
                f"({self._model.mel_stack}), or check the transcripts"
            )
        return count

    def _find_units(self, corpus: "PreparedCorpus") -> SoundUnits | None:
        count = self._model.sound_units
        if not count or self.plan.modality != "sound" or not self.objective.hides_inputs:
            return None
        splits = resolve_splits(corpus, PRETRAINING)
        return find_sound_units(corpus, splits, self._model.mel_stack, count)

    def _inputs(
        self,
        local: np.ndarray,
        random: BatchRandom | None,
        config: AugmentConfig | None,
        tower: str | None = None,
    ) -> tuple[Tensors, PixelChange | None]:
        """Inputs of a tower, by default that of the rows, and a change of their pixels."""
        modality = self.task.towers[tower or self.own_tower].modality
        column = tower_column(self.task, tower) if tower else INPUT_COLUMNS[modality]
        limit = self.limit if modality == self.plan.modality else self._model_limit(modality)
        if modality in ("image", "video"):
            name = INPUT_COLUMNS[modality]
            x = self._fixed(column).take(local)
            require_pixel_sizes(modality, x.shape[1:], self._model, self.location)
            stored = {name: torch.from_numpy(x)}
            if random is None or config is None:
                return stored, None
            change, drawn = pixel_changes.draw_change(modality, config, random)
            return stored | drawn, change
        crop = random.uniform("crop") if random is not None else None
        if modality == "sound":
            mel, frames = self._ragged(column).take(local, limit, crop)
            if random is not None and config is not None:
                mel, frames = augment.augment_audio(
                    mel, frames, config, random, self._model.max_frames, self._deviation
                )
            return {"log_mel": torch.from_numpy(mel), "frames": _to_int64(frames)}, None
        tokens, lengths = self._ragged(column).take(local, limit, crop, PAD_TO)
        if random is not None and config is not None:
            share = config.token_dropout if modality == "text" else config.code_dropout
            tokens = augment.drop_tokens(tokens, lengths, share, random, limit)
        return {"tokens": _to_int64(tokens)}, None

    def _masked(
        self, local: np.ndarray, random: BatchRandom, config: AugmentConfig | None
    ) -> StoredRows:
        """Augmented rows, masked in part, with the masked values as targets."""
        if config is not None:
            # These augmentations hide parts of the input, which would then become targets.
            config = replace(
                config, time_masks=0, frequency_masks=0, token_dropout=0.0, code_dropout=0.0
            )
        inputs, change = self._inputs(local, random, config)
        if self.plan.modality in ("image", "video"):
            masked_BT, change = self._draw_pixel_mask(inputs, change, random)
            inputs[pixel_changes.PLACES] = masking.list_places(masked_BT)
            changes = {self.own_tower: replace(change, has_targets=True)}
            return {self.own_tower: inputs}, {pixel_changes.MASKED: masked_BT}, changes
        inputs, targets = self._mask(self.plan.modality, inputs, random)
        return {self.own_tower: inputs}, targets, {}

    def _draw_pixel_mask(
        self, inputs: Tensors, change: PixelChange | None, random: BatchRandom
    ) -> tuple[Tensor, PixelChange]:
        """Return the (B, T) mask of images or videos, and their change with masked tokens."""
        modality = self.plan.modality
        column = INPUT_COLUMNS[modality]
        masked_BT = self._mask.draw_pixel_mask(modality, len(inputs[column]), random)
        change = change or PixelChange(column)
        return masked_BT, replace(change, tubelet=self._mask.find_tubelet(modality))

    def _two_views(
        self,
        rows: np.ndarray,
        local: np.ndarray,
        random: BatchRandom,
        config: AugmentConfig | None,
    ) -> StoredRows:
        """Each row twice, augmented and masked with independent random numbers."""
        towers, changes = {}, {}
        for tower in ("query", "candidate"):
            branch = random.branch(tower)
            inputs, change = self._inputs(local, branch, config)
            if self.plan.modality in ("image", "video"):
                masked_BT, changes[tower] = self._draw_pixel_mask(inputs, change, branch)
                inputs[pixel_changes.MASKED] = masked_BT
            else:
                inputs, _ = self._mask(self.plan.modality, inputs, branch)
                # A view does not mark its masked tokens for the model.
                del inputs["places"]
            towers[tower] = inputs
        # The groups of a corpus mark similar rows, as labels do; here only a row equals itself.
        return towers, {"groups": _to_int64(rows)}, changes

    def _queries(self, rows: np.ndarray, local: np.ndarray, random: BatchRandom | None) -> Tensors:
        column = self._nested("caption_tokens")
        counts, captions = column.counts(local), column.first(local)
        self._require_captions(counts, rows)
        if random is not None:
            chance, choice = random.uniform("caption", 2).T
            drawn = np.floor(choice * counts).astype(np.int64)
            captions = captions + np.where(chance < self._first_caption_prob, 0, drawn)
        limit = self._model.max_tokens
        tokens, _ = column.inner.take(captions, limit, None, PAD_TO)
        return {"tokens": _to_int64(tokens)}

    def _fixed(self, name: str) -> FixedColumn:
        return self._column(name, FixedColumn)

    def _ragged(self, name: str) -> RaggedColumn:
        return self._column(name, RaggedColumn)

    def _nested(self, name: str) -> NestedRaggedColumn:
        return self._column(name, NestedRaggedColumn)

    def _column(self, name: str, column_class: type[ColumnT]) -> ColumnT:
        column = self.shard_table.column(name)
        if not isinstance(column, column_class):
            raise UserError(
                f"{self.location}: column {name!r} holds {self.shard_table.column_type(name)}, "
                f"which task {self.name} cannot read; prepare the corpus again"
            )
        return column


def _to_int64(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.int64, copy=False))
