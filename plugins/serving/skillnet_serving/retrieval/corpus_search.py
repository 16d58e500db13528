"""Search in one prepared corpus: its rows ranked for a query, and the page of the results.

    query ── tower of its modality ──> vector
    rows  ── the other tower ────────> vectors, ranked by their cosine to that of the query

The other tower reads the rows themselves, or their first captions. Training compares both towers
in both directions, so either may read the query.

:class:`CorpusSearch` is the main entry point. ``skillnet search`` opens one for a query;
``skillnet serve`` keeps one for each task and modality of queries.
"""

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.config.folds import FoldConfig
from pipelines.data.shards.columns import PAIRED_PREFIX, RaggedColumn, open_column, view_numbers
from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.shards.folds import open_fold
from pipelines.data.transforms.decode_guard import WorkBudget
from pipelines.serving.bundle import list_licences
from pipelines.serving.inputs import PredictionItem
from pipelines.serving.predictor import TaskPredictor
from pipelines.training.evaluation.evaluator import locate_task_corpus
from pipelines.training.evaluation.inference import split_inputs
from pipelines.training.loading.task_columns import is_row_tower, tower_column
from pipelines.training.runs.model_source import ModelSource
from pipelines.training.runs.vocabulary_match import check_corpus_vocabulary
from skillnet.modality import CAPTION_MODALITY, find_modality
from skillnet.objectives.base import PAIR, find_objective
from skillnet.skills import Task, find_task
from skillnet_platform import console
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError
from skillnet_platform.storage import human_bytes, run_root
from skillnet_platform.storage.locks import hold_lock
from skillnet_serving.retrieval.search_page import QueryPreview, ResultCard, render_search_page
from skillnet_serving.retrieval.vector_index import (
    TYPES,
    JoinedScores,
    RecallMeter,
    VectorCode,
    count_columns,
    decode_vectors,
    encode_vectors,
    iter_best,
    read_cached,
    read_recall,
    write_index,
)

#: Task of a search if the model has several.
DEFAULT_TASK = "text_to_image"
#: Share of a query's tokens that occur in no text of the corpus, from which a search warns.
DOUBTED_FRACTION = 0.5
#: Increase it when the index changes, so that cached files are not reused.
INDEX_VERSION = 5
#: Rows that are embedded before they are encoded: 16 MiB at a width of 512.
CHUNK_ROWS = 8192
#: Queries of the corpus that measure what a code loses.
SAMPLED_QUERIES = 100
#: A search holds the embeddings of all searched rows in memory.
MAX_INDEX_BYTES = 4 * 2**30


class MissingCaptionsError(UserError):
    """Rows have no captions that a search could rank."""


@dataclass(frozen=True)
class SearchHit:
    """One result of a search.

    Args:
        rank: from 1.
        score: cosine similarity to the query.
        key: name of the row, or of its partner if the second medium of rows in two media is ranked.
        split: split that the row belongs to.
        caption: first caption of the row; its text or transcript, or its key, if it has none.
        captions: all captions of the row.
        row: number of the row in its split.
    """

    rank: int
    score: float
    key: str
    split: str
    caption: str
    captions: list[str]
    row: int


@dataclass
class SearchIndex:
    """Vectors of the rows of a search; searches of models that answer a task alike share them.

    Args:
        num_embedded: number of rows that have a vector.
        problem: why the index cannot be built; "" if nothing is known.
        scores: ranks the rows; None until all of them have a vector.
        recall: share of the ten best rows of float32 vectors that encoded ones find; None if it
            was not measured.
    """

    num_embedded: int = 0
    problem: str = ""
    scores: JoinedScores | None = None
    recall: float | None = None


class CorpusSearch:
    """Ranking of the rows of a task's corpus for queries of one modality.

    Args:
        predictor: with the model.
        source: run, version or folder of the model.
        data: directory or URI of prepared corpora.
        task: a retrieval task.
        splits: to search; None takes all except pretrain.
        modality: medium of the queries; a tower of the task reads it.
        code: numbers of the index: float32, int8 or binary.

    The index is opened or built by :meth:`open_index`, which may take long.

    Raises:
        UserError: the corpus or a split is missing, or the corpus is of another modality.
        MissingCaptionsError: captions are ranked, and the rows have none.
    """

    def __init__(
        self,
        predictor: TaskPredictor,
        source: ModelSource,
        data: str | Path,
        task: str,
        splits: Sequence[str] | None = None,
        modality: str = CAPTION_MODALITY,
        code: VectorCode = "float32",
    ) -> None:
        self.predictor, self.task, self.modality, self.code = predictor, task, modality, code
        spec = predictor.model.config.tasks[task]
        query_tower = find_query_tower(spec, modality)
        assert query_tower is not None, f"{task} reads no {modality}"
        self._query_tower = query_tower
        self._query_column = tower_column(spec, query_tower)
        ranked = "candidate" if self._query_tower == "query" else "query"
        #: Column and modality of the media that hits show: the ranked ones, or those of the rows.
        shown = spec.row_tower if ranked == spec.caption_tower else ranked
        self._column, self._shown = tower_column(spec, shown), spec.towers[shown].modality
        self._prefix = PAIRED_PREFIX if shown == spec.paired_tower else ""
        corpus = open_corpus(locate_task_corpus(data, task, source.corpora))
        # Rows of a reserve are for the final evaluation of a study.
        self.corpus = open_fold(corpus, FoldConfig())
        check_corpus_vocabulary(predictor.model, task, self.corpus)
        needs_captions = ranked == spec.caption_tower
        self.splits = _choose_splits(self.corpus, splits, needs_captions)
        #: Number of searched rows.
        self.num_rows = self._require_rows()
        self.index = SearchIndex()
        self._source, self._ranked = source, ranked
        version = "" if source.version is None else f" (version {source.version})"
        self.model = f"{source.name}{version}"

    def take_model(self, predictor: TaskPredictor, source: ModelSource) -> "CorpusSearch":
        """Return this search with another model; both have one index.

        Args:
            predictor: with a model that answers the task alike.
            source: run, version or folder of the model.
        """
        other = copy.copy(self)
        other.predictor, other._source = predictor, source
        return other

    @property
    def is_open(self) -> bool:
        """Whether the index is in memory."""
        return self.index.scores is not None

    def describe_progress(self) -> dict[str, Any]:
        """Return the rows of the index, those that are embedded, and whether it is in memory."""
        return {
            "corpus": self.corpus.name,
            "rows": self.num_rows,
            "embedded": self.index.num_embedded,
            "ready": self.is_open,
        }

    def open_index(
        self, place: str = "", on_rows: Callable[[int], object] = lambda rows: None
    ) -> None:
        """Read the index of the corpus, or embed its rows; other threads may read the progress.

        Args:
            place: position of this search among others, for progress; "" for a single one.
            on_rows: called with the number of rows of each batch that is embedded.
        """

        def count(rows: int) -> None:
            self.index.num_embedded += rows
            on_rows(rows)

        width = self.predictor.model.config.embedding_dim
        self.index.scores = JoinedScores(self.embed_rows(place, count), width)
        self.index.num_embedded = self.num_rows
        if self.code != "float32":
            console.print_note(f"{self.task}: {self.describe_loss()}")

    def describe_loss(self) -> str:
        """Return the memory of an index of int8 or binary vectors, and what they lose."""
        width = self.predictor.model.config.embedding_dim
        size = human_bytes(self.num_rows * _row_bytes(self.code, width))
        exact = human_bytes(self.num_rows * _row_bytes("float32", width))
        recall = self.index.recall
        found = "not measured, because no row has a query"
        if recall is not None:
            found = f"{recall:.1%} of the ten best rows of float32 vectors"
        return f"{self.code} vectors take {size} instead of {exact}; they find {found}"

    def embed_rows(
        self, place: str = "", on_rows: Callable[[int], object] = lambda rows: None
    ) -> np.ndarray:
        """Return the vectors of all rows; the file is cached by model and corpus.

        Args:
            place: position of this search among others, for progress.
            on_rows: called with the number of rows of each batch that is embedded.

        Returns:
            Encoded vectors (N, C), in the order of the splits and their rows.
        """
        predictor, task, tower = self.predictor, self.task, self._ranked
        config, limit = predictor.model.config, predictor.tasks[task]["limit"]
        # Skills and tasks that a package adds change nothing here, so the file stays valid.
        computed = self._source.digest_task(predictor.model, task)
        # bf16 and float32 give different vectors, so an index belongs to one precision.
        precision = predictor.runner.precision.name
        about = [INDEX_VERSION, computed, self.corpus.digest, task, tower, self.splits, precision]
        key = digest_config([*about, limit, self.code])
        path = run_root() / "cache" / "indexes" / f"{task}-{key[:16]}.safetensors"
        shape = (self.num_rows, config.embedding_dim)
        if (found := read_cached(path, key, shape, self.code)) is not None:
            self.index.recall = read_recall(path)
            return found
        # Replicas of a server start together: one embeds, the others wait for its file.
        with hold_lock(
            path.with_suffix(".lock"),
            lambda holder: f"{path}: waiting for {holder}, which embeds {self.corpus.name}",
            wait=True,
        ):
            if (found := read_cached(path, key, shape, self.code)) is not None:
                self.index.recall = read_recall(path)
                return found
            parts, title = [], f"embedding {self.corpus.name}{place}"
            is_exact = self.code == "float32"
            meter = None if is_exact else RecallMeter(self._embed_sample())
            with console.show_progress(title, self.num_rows, "rows") as bar:

                def advance(count: int) -> None:
                    bar.advance(count)
                    on_rows(count)

                for name in self.splits:
                    bar.advance(0, name)
                    table = self.corpus.splits[name].table()
                    step = max(len(table), 1) if is_exact else CHUNK_ROWS
                    for start in range(0, len(table), step):
                        rows = table.slice(start, step)
                        vectors = self._embed_table(rows, name, tower, advance)
                        parts.append(encode_vectors(vectors, self.code))
                        if meter is not None:
                            meter.add_rows(vectors, decode_vectors(parts[-1], shape[1]))
            encoded = np.concatenate(parts)
            self.index.recall = None if meter is None else meter.measure_recall()
            write_index(path, key, encoded, self.index.recall)
        return encoded

    def _embed_table(
        self,
        table: pa.Table,
        split: str,
        tower: str,
        on_rows: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Return the unit vectors of rows of a split, (N, E) float32."""
        predictor, task = self.predictor, self.task
        config = predictor.model.config
        spec = config.tasks[task]
        inputs = split_inputs(
            table,
            spec.towers[tower],
            config,
            f"{self.corpus.name}/{split}",
            column=tower_column(spec, tower),
            # The limit is about the corpus' own modality.
            limit=predictor.tasks[task]["limit"] if is_row_tower(spec, tower) else None,
        )
        return predictor.runner.embed(task, tower, inputs, on_rows)

    def _embed_sample(self) -> np.ndarray:
        """Return the unit vectors of queries that rows of the corpus have, (Q, E)."""
        spec = self.predictor.model.config.tasks[self.task]
        for name in self.splits:
            table = self.corpus.splits[name].table()
            reads_captions = self._query_tower == spec.caption_tower
            if len(table) and (not reads_captions or _has_captions(table)):
                count = min(SAMPLED_QUERIES, len(table))
                rows = np.random.default_rng(0).choice(len(table), count, replace=False)
                return self._embed_table(table.take(np.sort(rows)), name, self._query_tower)
        return np.empty((0, self.predictor.model.config.embedding_dim), np.float32)

    def _require_rows(self) -> int:
        """Return the number of rows; raise UserError for rows that cannot be embedded."""
        corpus, config = self.corpus, self.predictor.model.config
        spec = config.tasks[self.task]
        modality = spec.towers[spec.row_tower].modality
        # Both audio and video have a column ``frames``, so a wrong corpus would fail in the stem.
        if corpus.modality != modality:
            raise UserError(
                f"{self.task}: the task ranks {modality}, but the corpus {corpus.name} holds "
                f"{corpus.modality}. Use a model that was trained on this corpus"
            )
        rows = sum(corpus.splits[name].rows for name in self.splits)
        if not rows:
            raise UserError(
                f"{corpus.name}: no rows in {', '.join(self.splits) or 'any split but pretrain'}. "
                "Name other splits with --splits; the corpus has "
                f"{', '.join(corpus.splits) or 'none'}"
            )
        size = rows * _row_bytes(self.code, config.embedding_dim)
        # Checked in advance: embedding takes long, and memory would run out only at its end.
        if size > MAX_INDEX_BYTES:
            raise UserError(
                f"{corpus.name}: vectors of {rows:,} rows take {human_bytes(size)}, a search holds "
                f"at most {human_bytes(MAX_INDEX_BYTES)} in memory; name some of its splits, for "
                # The smallest split is the one that fits most probably.
                f"example --splits {min(self.splits, key=lambda name: corpus.splits[name].rows)}"
            )
        return rows

    def read_query(self, query: PredictionItem, budget: WorkBudget | None = None) -> np.ndarray:
        """Return the model input of a query.

        Args:
            query: text or file of the modality of this search.
            budget: seconds and cancellation of the request that asks.

        Raises:
            UserError: the query is empty or damaged.
        """
        return self.predictor.read_row(query, self.task, self._query_tower, budget)

    def describe_doubt(self, query_row: np.ndarray) -> str:
        """Return a warning if most of a text query occurs in no text of the corpus; "" otherwise.

        Args:
            query_row: result of :meth:`read_query`.
        """
        if self.modality != CAPTION_MODALITY or not self._known_tokens.any():
            return ""
        unknown = int((~self._known_tokens[query_row]).sum())
        if unknown < DOUBTED_FRACTION * len(query_row):
            return ""
        return (
            f"{unknown} of {len(query_row)} tokens of the query occur in no text of "
            f"{self.corpus.name}, perhaps because they are of another language; the ranking may "
            "be arbitrary"
        )

    @functools.cached_property
    def _known_tokens(self) -> np.ndarray:
        """Tokens of the texts that the query's tower reads in the corpus, (vocabulary,) bool."""
        known = np.zeros(self.predictor.model.config.vocab_size, bool)
        for split in self.corpus.splits.values():
            table = split.table()
            if self._query_column not in table.column_names:
                continue
            for chunk in table[self._query_column].chunks:
                while not pa.types.is_integer(chunk.type):
                    chunk = chunk.flatten()
                known[view_numbers(chunk).clip(0, len(known) - 1)] = True
        # Bytes spell characters that no text had.
        tokenizer = self.predictor.tokenizer
        first, unknown = tokenizer.token_to_id("<0x00>"), tokenizer.token_to_id("[UNK]")
        if first is not None:
            known[first : first + 256] = False
        if unknown is not None:
            known[unknown] = False
        return known

    def embed_query(self, query_row: np.ndarray) -> np.ndarray:
        """Return the unit vector of a query, (E,); one thread at a time may use the model.

        Args:
            query_row: result of :meth:`read_query`.
        """
        return self.predictor.embed_row(query_row, self.task, self._query_tower)

    def rank_rows(self, query_vector: np.ndarray, top: int) -> list[SearchHit]:
        """Return the best rows for a query, best first; several threads may call it.

        Args:
            query_vector: result of :meth:`embed_query`.
            top: number of results.
        """
        assert self.index.scores is not None  # opened before
        scores = self.index.scores.score(query_vector)
        return _rank_hits(self.corpus, self.splits, scores, top, self._prefix)

    def render_hits(
        self,
        query: str,
        hits: Sequence[SearchHit],
        tasks: Mapping[str, Sequence[str]] | None = None,
        preview: QueryPreview | None = None,
        doubt: str = "",
    ) -> str:
        """Return the results as one HTML page with embedded images.

        Args:
            query: text of the user, or name of the file.
            hits: best first.
            tasks: modality of queries -> tasks that a server can search; the page gets inputs.
                None without a server.
            preview: picture or player of a file as the query.
            doubt: result of :meth:`describe_doubt`.
        """
        facts = [
            ("task", self.task),
            ("model", self.model),
            ("searched", f"{self.num_rows:,} rows of {self.corpus.name}"),
            ("date", time.strftime("%Y-%m-%d")),
            *([("caution", doubt)] if doubt else []),
        ]
        cards = []
        for hit in hits:
            others = [caption for caption in hit.captions if caption != hit.caption]
            details = ([" · ".join(others)] if others else []) + [f"{hit.key} · {hit.split}"]
            media, code = self._load_content(hit)
            cards.append(ResultCard(hit.rank, hit.score, hit.caption, details, media, code))
        credit = credit_line(self.corpus)
        return render_search_page(
            query, cards, facts, credit, tasks or {}, self.task, preview=preview
        )

    def _load_content(self, hit: SearchHit) -> tuple[np.ndarray | None, str | None]:
        """Return the picture or the video of a hit, or its text or code."""
        modality, table = find_modality(self._shown), self.corpus.splits[hit.split].table()
        if modality.reads_tokens:
            return None, _read_cell(table, self._prefix + modality.content_column, hit.row)
        column: Any = open_column(table, self._column, self.corpus.name)
        taken = column.take(np.array([hit.row]))
        # Padded rows come with their lengths.
        row = taken[0][0] if isinstance(column, RaggedColumn) else taken[0]
        media = modality.file_half.draw(row)
        # Pen paths are white on black for the model; the page shows them black on white.
        about = self.corpus.manifest["paired"] if self._prefix else self.corpus.manifest
        return (255 - media if "pen" in about.get("preprocessing", {}) else media), None


def find_query_tower(task: Task, modality: str) -> str | None:
    """Return the tower of a retrieval task that reads queries of a modality; None if none does.

    Args:
        task: any task.
        modality: medium of the query. If both towers read it, the query tower is the one.
    """
    towers = PAIR if find_objective(task.objective).pairs_towers else ()
    return next((each for each in towers if task.towers[each].modality == modality), None)


def list_search_tasks(tasks: Mapping[str, Task], modality: str) -> list[str]:
    """Return the names of the tasks that rank rows for a modality, best choice first.

    Args:
        tasks: objective and towers of each task of the model.
        modality: medium of the query. Tasks whose query tower reads it come first.
    """
    towers = {name: find_query_tower(task, modality) for name, task in tasks.items()}
    return [name for each in ("query", "candidate") for name in towers if towers[name] == each]


def choose_search_task(given: str | None, tasks: Mapping[str, Task], modality: str) -> str:
    """Return the task that ranks rows for a query.

    Args:
        given: name of the task, or None.
        tasks: objective and towers of each task of the model.
        modality: medium of the query.

    Raises:
        UserError: it is no retrieval task, or reads no such query. Without a name: the model has
            no such task, or several.
    """
    searchable = list_search_tasks(tasks, modality)
    if given is None:
        # A task whose query tower reads the modality was made for such queries.
        direct = [name for name in searchable if tasks[name].towers["query"].modality == modality]
        choices = direct or searchable
        if len(choices) == 1 or DEFAULT_TASK in choices:
            return choices[0] if len(choices) == 1 else DEFAULT_TASK
        if choices:
            raise UserError(f"--task: {', '.join(choices)} rank rows for {modality}. Give one")
        raise UserError(
            f"--model: none of its tasks ({', '.join(tasks)}) ranks rows for {modality}. Give "
            "another model, or use skillnet predict"
        )
    spec = find_task(given, tasks)
    if given in searchable:
        return given
    reason = "is not a retrieval task"
    if find_objective(spec.objective).pairs_towers:
        media = (spec.towers[tower].modality for tower in PAIR)
        read = " and ".join(dict.fromkeys(media))
        reason = f"reads {read}, the query is {modality}"
    raise UserError(
        f"{given}: the task {reason}. Use one that ranks rows for {modality}: "
        f"{', '.join(searchable) or 'this model has none'}"
    )


def _choose_splits(
    corpus: PreparedCorpus, names: Sequence[str] | None, needs_captions: bool
) -> list[str]:
    """Return the named splits, or all except pretrain; without those that lack needed captions.

    Raises:
        UserError: the corpus has no such split.
        MissingCaptionsError: a named split, or each split, has rows without captions.
    """
    for name in names or ():
        if name not in corpus.splits:
            raise UserError(
                f"corpus {corpus.name} has no split {name!r}; it has {', '.join(corpus.splits)}"
            )
    # Pretraining rows would enlarge the index, whose size is limited. --splits includes them.
    chosen = [name for name in corpus.splits if name != "pretrain"] if names is None else names
    found = list(dict.fromkeys(chosen))  # a split named twice would list its rows twice
    if not needs_captions:
        return found
    captioned = [name for name in found if _has_captions(corpus.splits[name].table())]
    missing = [name for name in found if name not in captioned]
    if not captioned or (missing and names is not None):
        raise MissingCaptionsError(
            f"{corpus.name}: rows of {', '.join(missing)} have no captions, which are ranked for "
            "queries of another modality than text. Name splits with captions by --splits"
        )
    return captioned


def _row_bytes(code: VectorCode, width: int) -> int:
    return count_columns(code, width) * np.dtype(TYPES[code]).itemsize


def _has_captions(table: Any) -> bool:
    """Return whether every row has a caption."""
    if "caption_tokens" not in table.column_names:
        return False
    return pc.min(pc.list_value_length(table["caption_tokens"])).as_py() != 0


def credit_line(corpus: PreparedCorpus) -> str:
    """Return authors and licences of the data of built-in corpora; "" for other corpora.

    Args:
        corpus: that was searched.
    """
    licences = list_licences(corpus.source_names)
    return f"From {'; '.join(licences)}." if licences else ""


def _rank_hits(
    corpus: PreparedCorpus, splits: Sequence[str], scores: np.ndarray, top: int, prefix: str
) -> list[SearchHit]:
    ends = np.cumsum([corpus.splits[name].rows for name in splits])
    hits: list[SearchHit] = []
    found: set[str] = set()
    for rank in iter_best(scores, top):
        if len(hits) == top:
            break
        # The end of a split is the first row of the next one, hence side="right".
        number = int(np.searchsorted(ends, rank, side="right"))
        name = splits[number]
        row = int(rank) - int(ends[number]) + corpus.splits[name].rows
        table = corpus.splits[name].table()
        key = _read_cell(table, prefix + "key", row)
        # Several rows may have one partner.
        if prefix and key in found:
            continue
        found.add(key)
        captions = _read_cell(table, "captions", row) or []
        # Audio may have a transcript only, and the rows of a split for prediction have neither.
        caption = captions[0] if captions else _read_cell(table, "text", row) or key
        hits.append(
            SearchHit(len(hits) + 1, float(scores[rank]), key, name, caption, captions, row)
        )
    return hits


def _read_cell(table: Any, column: str, row: int) -> Any:
    """Return the value of a row, or None if the table has no such column."""
    return table.column(column)[row].as_py() if column in table.column_names else None
