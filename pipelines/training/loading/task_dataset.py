"""Dataset of one task: rows of its splits as towers and targets, augmented and masked.

Shapes: B rows, T tokens, L symbols.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.columns import (
    FixedColumn,
    NestedRaggedColumn,
    RaggedColumn,
    open_column,
)
from pipelines.data.shards.shard_list import SharedArray
from pipelines.data.transforms.sound import count_alignment_tokens
from pipelines.training.config.data import AugmentConfig, MaskConfig
from pipelines.training.config.run import TaskTraining
from pipelines.training.loading import pixel_changes
from pipelines.training.loading.pixel_changes import PixelChange, PixelChanges
from pipelines.training.loading.task_columns import (
    PRETRAINING,
    ShardTable,
    model_id_ranges,
    resolve_splits,
    take_targets,
    tower_column,
)
from skillnet.config import SkillNetConfig
from skillnet.keyed_random import BatchRandom
from skillnet.modalities.tensors import RowAugmentation, RowMasking, list_places
from skillnet.modalities.tokens import TokenTensors
from skillnet.modality import Modality, find_modality
from skillnet.objectives.base import find_objective
from skillnet.objectives.retrieval import unique_group_ids
from skillnet.skills import SkillPlan, Task
from skillnet_platform.errors import UserError, check_known_names

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus


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
        order = np.argsort(ids, kind="stable")
        _, first, inverse, counts = np.unique(
            ids[order], return_index=True, return_inverse=True, return_counts=True
        )
        if not (counts > 1).any():
            raise UserError(
                f"{location}: no two rows have one group, so a row has no other one to find. "
                "Prepare the corpus with its option task: pairs; the label names the item of a row"
            )
        # Row in the order of the groups; begin and size of the row's group; its place in it.
        table = np.empty((len(ids), 4), np.int64)
        table[:, 0] = order
        table[order, 1], table[order, 2] = first[inverse], counts[inverse]
        table[order, 3] = np.arange(len(ids)) - first[inverse]
        self._table = SharedArray(table)

    def draw(self, rows: np.ndarray, choice: np.ndarray | None = None) -> np.ndarray:
        """Return another row of each row's group, (B,); the row itself if it is alone.

        Args:
            rows: (B,) row numbers.
            choice: (B,) numbers in [0, 1) that choose among the others; None takes the next one.
        """
        _, start, count, place = self._table.values[rows].T
        others = np.maximum(count - 1, 1)
        steps = 1 if choice is None else 1 + np.floor(choice * others).astype(np.int64)
        places = (place + steps) % count
        return np.asarray(self._table.values[start + places, 0])


ColumnT = TypeVar("ColumnT", FixedColumn, RaggedColumn, NestedRaggedColumn)
Tensors = dict[str, Tensor]
#: Tower -> tensors with stored pixels, targets, and the changes of the pixels.
StoredRows = tuple[dict[str, Tensors], Tensors, PixelChanges]


#: Largest number of tokens for k-means, spread evenly over the rows.
MAX_TOKENS = 100_000
KMEANS_ITERATIONS = 50
KMEANS_SEED = 0


class TokenUnits:
    """Mean values of the units, and assignment of tokens to them.

    Args:
        centres_KP: mean values, float32.
    """

    def __init__(self, centres_KP: Tensor) -> None:
        self.centres_KP = centres_KP
        self._squares_K = centres_KP.square().sum(1)

    def __call__(self, x_BTP: Tensor) -> Tensor:
        """Return the (B, T) number of the nearest unit of each token of (B, T, P) values."""
        x = x_BTP.to(self.centres_KP.dtype)
        return (self._squares_K - 2 * x @ self.centres_KP.T).argmin(-1)


_units_by_key: dict[tuple[str, int, int], TokenUnits] = {}


def find_token_units(
    corpus: "PreparedCorpus", splits: tuple[str, ...], model: SkillNetConfig
) -> TokenUnits:
    """Return the units of a corpus, computed once per process.

    Args:
        corpus: opened.
        splits: its splits that pretraining reads.
        model: grid of tokens, and the number of units, K.

    Raises:
        UserError: the rows have fewer complete tokens than that.
    """
    half = find_modality(corpus.modality).tensor_half
    count = half.count_classes(model)
    key = (corpus.digest, half.count_values(model), count)
    if key not in _units_by_key:
        tokens_NP = _collect_tokens(corpus, splits, model)
        if len(tokens_NP) < count:
            raise UserError(
                f"corpus {corpus.name} has {len(tokens_NP)} tokens of {corpus.modality} in "
                f"{'+'.join(splits)}: too few for {count} units; lower model.sound_units"
            )
        _units_by_key[key] = TokenUnits(torch.from_numpy(_means(tokens_NP, count)))
    return _units_by_key[key]


def _collect_tokens(
    corpus: "PreparedCorpus", splits: tuple[str, ...], model: SkillNetConfig
) -> np.ndarray:
    """(N, P) values of complete tokens of padded rows, at most about ``MAX_TOKENS``."""
    modality, parts = find_modality(corpus.modality), []
    half = modality.tensor_half
    for split in splits:
        table = corpus.splits[split].table()
        column = open_column(table, modality.column, f"{corpus.name}/{split}")
        assert isinstance(column, RaggedColumn)
        every = max(1, -(-int(half.count_tokens(model, column.lengths()).sum()) // MAX_TOKENS))
        for rows in np.array_split(np.arange(len(column))[::every], max(1, len(column) // 256)):
            if len(rows):
                batch = half.make_batch(*column.take(rows))
                x = batch[modality.column]
                is_real = half.find_visible(batch).expand(x.shape).to(x.dtype)
                is_complete = half.cut(is_real, model).amin(-1) == 1
                parts.append(half.cut(x, model)[is_complete].numpy())
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def _means(tokens_NP: np.ndarray, count: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # One thread: the sums of several threads have varying order, and differ in the last bits.
    with threadpool_limits(1):
        kmeans = KMeans(count, n_init=1, max_iter=KMEANS_ITERATIONS, random_state=KMEANS_SEED).fit(
            tokens_NP
        )
    return kmeans.cluster_centers_.astype(np.float32)


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
        self.modality = find_modality(self.plan.modality)
        if corpus.modality != self.plan.modality:
            raise UserError(
                f"task {name} reads {self.plan.modality}, but corpus {corpus.name} holds "
                f"{corpus.modality}; set tasks.{name}.corpus to one of that modality"
            )
        if task.paired_tower is not None:
            self._require_paired_rows(corpus)
        if self.modality.tensor_half.find_longest(model) is not None:
            # Rows of one size are checked by their shape, when they are read.
            prepared = self.modality.list_sizes(corpus.manifest["preprocessing"])
            wrong = {k: n for k, n in prepared.items() if n != self.modality.read_size(model, k)}
            require_sizes(self.modality, wrong, model, self.location)
        # The model's own limit applies first; the task may lower it.
        self.limit = min(self._model_limit(self.modality), max_length or 1 << 30)
        #: What the task learns.
        self.objective = find_objective(task.objective)
        aligns_targets = self.objective.aligns_targets
        if aligns_targets and "max_seconds" in corpus.manifest["preprocessing"]:
            self._reject_cropping(corpus)
        #: Rows whose targets have no alignment with the model's tokens.
        self.unalignable_rows = self._count_unalignable() if aligns_targets else 0
        self._value_scale = self.objective.read_scale(corpus.manifest)
        #: Factor of the loss of a row of each class, (C,).
        self._class_weights: np.ndarray | None = None
        if settings.class_weights is not None:
            names = corpus.manifest[str(self.objective.listed)]
            self._class_weights = self._weigh_classes(settings.class_weights, names)
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
        # Another package's modality has no fraction of its own in the settings.
        share = getattr(masks, self.plan.modality, self.modality.masked_fraction)
        self._masking = RowMasking(
            model,
            masks,
            masks.views if self.views else share,
            vocab_size,
            self.limit,
            self._find_units(corpus),
        )

    def row_lengths(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the (rows,) sequence lengths of rows; None for images and videos.

        Args:
            rows: row numbers, whose shards are opened.
        """
        if self.modality.tensor_half.find_longest(self._model) is None:
            return None
        local = self._open_rows(rows)
        return np.minimum(
            self._column(self.modality.column, RaggedColumn).lengths(local), self.limit
        )

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
            if self._class_weights is not None:
                targets["weights"] = torch.from_numpy(self._class_weights[values])
        return targets

    def _weigh_classes(
        self, given: Literal["balanced"] | Mapping[str, float], names: Sequence[str]
    ) -> np.ndarray:
        """Return the factor of each class, (C,) float32; ``balanced`` reads the labels of all rows.

        Args:
            given: ``class_weights`` of the task.
            names: labels of the corpus, in the order of the classes.

        Raises:
            UserError: the corpus has no such label.
        """
        if given == "balanced":
            (target,) = self.objective.columns
            labels_N = self._column(target.column, FixedColumn).take(
                self._open_rows(np.arange(self.num_rows))
            )
            counts_C = np.bincount(labels_N, minlength=len(names))
            # A class without a row has no loss that its factor could change.
            balanced_C = len(labels_N) / (np.count_nonzero(counts_C) * np.maximum(counts_C, 1))
            return balanced_C.astype(np.float32)
        key = f"tasks.{self.name}.class_weights"
        check_known_names(given, names, key, "label")
        return np.array([given.get(name, 1.0) for name in names], np.float32)

    def check_columns(self) -> None:
        """Check the columns and captions of the open shards, so that a run is rejected early.

        Raises:
            UserError: a column is missing or of another type or size, or a row has no caption.
        """
        self.load(np.arange(1))
        if self.task.caption_tower is not None and not self.views:
            column = self._column("caption_tokens", NestedRaggedColumn)
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

    def _model_limit(self, modality: Modality) -> int:
        """Return the longest row of a modality that the model reads."""
        return modality.tensor_half.find_longest(self._model) or 1 << 30

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
        return GroupPairs(self._column("group", FixedColumn).take(local), self.location)

    def _reject_cropping(self, corpus: "PreparedCorpus") -> None:
        """A transcript needs its complete audio: raise UserError if the end would be cropped."""
        if 100 * float(corpus.manifest["preprocessing"]["max_seconds"]) <= self.limit:
            return  # no audio is longer, so its column need not be read
        self.shard_table.open()
        longest = int(self._column(self.modality.column, RaggedColumn).lengths().max())
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
        lengths = np.minimum(self._column(self.modality.column, RaggedColumn).lengths(), self.limit)
        tokens = self.modality.tensor_half.count_tokens(self._model, lengths)
        self._column("symbols", RaggedColumn)  # names the corpus if the column is missing
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

    def _find_units(self, corpus: "PreparedCorpus") -> TokenUnits | None:
        half = self.modality.tensor_half
        count = half.count_classes(self._model)
        if not count or self.modality.reads_tokens or not self.objective.hides_inputs:
            return None
        splits = resolve_splits(corpus, PRETRAINING)
        return find_token_units(corpus, splits, self._model)

    def _inputs(
        self,
        local: np.ndarray,
        random: BatchRandom | None,
        config: AugmentConfig | None,
        tower: str | None = None,
    ) -> tuple[Tensors, PixelChange | None]:
        """Inputs of a tower, by default that of the rows, and a change of their pixels."""
        modality = find_modality(self.task.towers[tower or self.own_tower].modality)
        half = modality.tensor_half
        column = tower_column(self.task, tower) if tower else modality.column
        limit = self.limit if modality == self.modality else self._model_limit(modality)
        lengths: np.ndarray | None = None
        if half.find_longest(self._model) is None:
            values = self._column(column, FixedColumn).take(local)
            wrong = half.check_shape(values.shape[1:], self._model)
            require_sizes(modality, wrong, self._model, self.location)
        else:
            crop = random.uniform("crop") if random is not None else None
            values, lengths = self._column(column, RaggedColumn).take(
                local, limit, crop, half.pad_to
            )
        if random is None or config is None:
            return half.make_batch(values, lengths), None
        change = RowAugmentation(config, random, limit, self._model, self._deviation)
        values, lengths = half.augment(values, lengths, change)
        batch = half.make_batch(values, lengths)
        if not half.has_pixels:
            return batch, None
        scale = half.scale_pixels(config)
        pixels, drawn = pixel_changes.draw_change(modality.column, scale, random)
        return batch | drawn, pixels

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
        if self.modality.tensor_half.has_pixels:
            masked_BT, change = self._draw_pixel_mask(inputs, change, random)
            inputs[pixel_changes.PLACES] = list_places(masked_BT)
            changes = {self.own_tower: replace(change, has_targets=True)}
            return {self.own_tower: inputs}, {pixel_changes.MASKED: masked_BT}, changes
        inputs, targets = self.modality.tensor_half.mask(inputs, self._masking, random)
        return {self.own_tower: inputs}, targets, {}

    def _draw_pixel_mask(
        self, inputs: Tensors, change: PixelChange | None, random: BatchRandom
    ) -> tuple[Tensor, PixelChange]:
        """Return the (B, T) mask of pixels, and their change with masked tokens."""
        half = self.modality.tensor_half
        masked_BT = torch.from_numpy(half.draw_mask(inputs, self._masking, random))
        change = change or PixelChange(self.modality.column)
        return masked_BT, replace(change, tubelet=half.find_tubelet(self._model))

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
            if self.modality.tensor_half.has_pixels:
                masked_BT, changes[tower] = self._draw_pixel_mask(inputs, change, branch)
                inputs[pixel_changes.MASKED] = masked_BT
            else:
                inputs, _ = self.modality.tensor_half.mask(inputs, self._masking, branch)
                # A view does not mark its masked tokens for the model.
                del inputs["places"]
            towers[tower] = inputs
        # The groups of a corpus mark similar rows, as labels do; here only a row equals itself.
        return towers, {"groups": _to_int64(rows)}, changes

    def _queries(self, rows: np.ndarray, local: np.ndarray, random: BatchRandom | None) -> Tensors:
        column = self._column("caption_tokens", NestedRaggedColumn)
        counts, captions = column.counts(local), column.first(local)
        self._require_captions(counts, rows)
        if random is not None:
            chance, choice = random.uniform("caption", 2).T
            drawn = np.floor(choice * counts).astype(np.int64)
            captions = captions + np.where(chance < self._first_caption_prob, 0, drawn)
        limit = self._model.max_tokens
        tokens, _ = column.inner.take(captions, limit, None, TokenTensors.pad_to)
        return {"tokens": _to_int64(tokens)}

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


def require_sizes(
    modality: Modality, wrong: Mapping[str, int], model: SkillNetConfig, location: str
) -> None:
    """Check that a model reads the sizes of rows.

    Args:
        modality: name of the modality of the rows.
        wrong: key of the model's sizes that differ -> size of the rows.
        model: sizes of its inputs.
        location: corpus and split, for the message.

    Raises:
        UserError: it reads other sizes; names the settings of the model and of the corpus.
    """
    if not wrong:
        return
    corpus = location.split("/")[0]
    option_of = {size.key: size.option for size in modality.sizes}
    found = ", ".join(f"{option_of[key]} {stored}" for key, stored in wrong.items())
    settings = ", ".join(f"model.{key} {stored}" for key, stored in wrong.items())
    options = " ".join(
        f"--options.{corpus}.{option_of[key]} {modality.read_size(model, key)}" for key in wrong
    )
    raise UserError(
        f"{location}: the rows were prepared with {found}, which the model does not read. "
        f"Set {settings}, or prepare the corpus with {options}"
    )
