"""Search in one prepared corpus: its rows ranked for a text, and the page of the results.

:class:`CorpusSearch` is the main entry point. ``skillnet search`` opens one for a query;
``skillnet serve`` keeps one for each task.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.serving.retrieval_index import build_retrieval_index
from skillnet.skills import Task, find_task
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.runs.model_source import ModelSource
    from pipelines.serving.predictor import TaskPredictor
    from pipelines.shards.dataset import PreparedCorpus

#: Task of a search if the model has several.
DEFAULT_TASK = "text_to_image"


@dataclass(frozen=True)
class SearchHit:
    """One result of a search.

    Args:
        rank: from 1.
        score: cosine similarity to the query.
        key: of the row.
        split: of the row.
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


class CorpusSearch:
    """Ranking of the rows of a task's corpus for texts.

    Args:
        predictor: with the model.
        source: of the model.
        data: directory or URI of prepared corpora.
        task: a retrieval task whose query is a text.
        splits: to search; None takes all except pretrain.

    Raises:
        UserError: the corpus or a split is missing, or the corpus is of another modality.
    """

    def __init__(
        self,
        predictor: "TaskPredictor",
        source: "ModelSource",
        data: str | Path,
        task: str,
        splits: Sequence[str] | None = None,
    ) -> None:
        from pipelines.config.folds import FoldConfig
        from pipelines.evaluation.evaluator import locate_task_corpus
        from pipelines.runs.vocabulary_match import check_corpus_vocabulary
        from pipelines.shards.dataset import open_corpus
        from pipelines.shards.folds import open_fold

        self.predictor, self.task = predictor, task
        corpus = open_corpus(locate_task_corpus(data, task, source.corpora))
        # Rows of a reserve are for the final evaluation of a study.
        self.corpus = open_fold(corpus, FoldConfig())
        check_corpus_vocabulary(predictor.model, task, self.corpus)
        self.splits = choose_search_splits(self.corpus, splits)
        self._vectors = build_retrieval_index(predictor, source, task, self.corpus, self.splits)
        version = "" if source.version is None else f" (version {source.version})"
        self.model = f"{source.name}{version}"

    @property
    def num_rows(self) -> int:
        """Number of searched rows."""
        return len(self._vectors)

    def find_hits(self, query: str, top: int) -> list[SearchHit]:
        """Return the best rows for a text, best first.

        Args:
            query: text of the user.
            top: number of results.
        """
        scores = self._vectors @ self.predictor.embed_texts(self.task, [query])[0]
        return _rank_hits(self.corpus, self.splits, scores, top)

    def render_hits(self, query: str, hits: Sequence[SearchHit], tasks: Sequence[str] = ()) -> str:
        """Return the results as one HTML page with embedded images.

        Args:
            query: text of the user.
            hits: best first.
            tasks: that a server can search; the page gets an input box. None without a server.
        """
        from pipelines.serving.search_page import ResultCard, render_search_page

        facts = [
            ("task", self.task),
            ("model", self.model),
            ("searched", f"{self.num_rows:,} rows of {self.corpus.name}"),
            ("date", time.strftime("%Y-%m-%d")),
        ]
        cards = []
        for hit in hits:
            others = [caption for caption in hit.captions if caption != hit.caption]
            details = ([" · ".join(others)] if others else []) + [f"{hit.key} · {hit.split}"]
            media, code = _load_content(self.corpus, hit)
            cards.append(ResultCard(hit.rank, hit.score, hit.caption, details, media, code))
        credit = credit_line(self.corpus)
        return render_search_page(query, cards, facts, credit, tasks, self.task)


def list_search_tasks(tasks: Mapping[str, Task]) -> list[str]:
    """Return the names of the tasks that rank rows for a text.

    Args:
        tasks: of the model.
    """
    return [
        name
        for name, task in tasks.items()
        if task.objective == "retrieval" and task.towers["query"].modality == "text"
    ]


def choose_search_task(given: str | None, tasks: Mapping[str, Task]) -> str:
    """Return the task that ranks rows for a text.

    Args:
        given: name of the task, or None.
        tasks: of the model.

    Raises:
        UserError: it is no retrieval task, or its query is of another modality. Without a name:
            the model has no such task, or several.
    """

    searchable = list_search_tasks(tasks)
    if given is None:
        if len(searchable) == 1 or DEFAULT_TASK in searchable:
            return searchable[0] if len(searchable) == 1 else DEFAULT_TASK
        if searchable:
            raise UserError(
                f"--task: {', '.join(searchable)} rank rows for a text; give one of them"
            )
        raise UserError(
            f"--model: none of its tasks ({', '.join(tasks)}) ranks rows for a text; give another "
            "model, or use skillnet predict"
        )
    spec = find_task(given, tasks)
    if given in searchable:
        return given
    reason = "is not a retrieval task"
    if spec.objective == "retrieval":
        reason = f"has a query of the modality {spec.towers['query'].modality}, not text"
    raise UserError(
        f"{given}: the task {reason}. Use one that ranks rows for a text: "
        f"{', '.join(searchable) or 'this model has none'}"
    )


def choose_search_splits(corpus: "PreparedCorpus", names: Sequence[str] | None) -> list[str]:
    """Return the splits to search: the named ones, or all except pretrain.

    Args:
        corpus: to search.
        names: of splits, or None.

    Raises:
        UserError: the corpus has no such split.
    """
    if names is None:
        # Pretraining rows would enlarge the index, whose size is limited. --splits includes them.
        return [name for name in corpus.splits if name != "pretrain"]
    for name in names:
        if name not in corpus.splits:
            raise UserError(
                f"corpus {corpus.name} has no split {name!r}; it has {', '.join(corpus.splits)}"
            )
    # A split that is named twice would list each of its rows twice.
    return list(dict.fromkeys(names))


def credit_line(corpus: "PreparedCorpus") -> str:
    """Return authors and licences of the data of a built-in corpus; "" for other corpora.

    Args:
        corpus: that was searched.
    """
    from pipelines.corpora import BUILT_IN, EXTRA_BUILT_IN, find_corpus

    if corpus.name not in BUILT_IN | EXTRA_BUILT_IN:
        return ""
    archives = find_corpus(corpus.name).archives
    return f"From {'; '.join(f'{a.requirement}: {a.licence}' for a in archives)}."


def _rank_hits(
    corpus: "PreparedCorpus", splits: Sequence[str], scores: np.ndarray, top: int
) -> list[SearchHit]:
    ends = np.cumsum([corpus.splits[name].rows for name in splits])
    hits: list[SearchHit] = []
    # Equal scores keep the order of the rows, so that results are reproducible.
    for rank in np.argsort(-scores, kind="stable")[:top]:
        # The end of a split is the first row of the next one, hence side="right".
        number = int(np.searchsorted(ends, rank, side="right"))
        name = splits[number]
        row = int(rank) - int(ends[number]) + corpus.splits[name].rows
        table = corpus.splits[name].table()
        key = _read_cell(table, "key", row)
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


def _load_content(corpus: "PreparedCorpus", hit: SearchHit) -> tuple[np.ndarray | None, str | None]:
    """Return the picture or the video of a hit, or its text or code."""
    from pipelines.loading.task_columns import INPUT_COLUMNS
    from pipelines.serving.search_page import draw_log_mel
    from pipelines.shards.columns import FixedColumn, RaggedColumn, open_column

    table = corpus.splits[hit.split].table()
    if corpus.modality in ("text", "code"):
        return None, _read_cell(table, corpus.modality, hit.row)
    # The modality selects the column: "frames" are pixels of a video, and lengths of audio.
    column = open_column(table, INPUT_COLUMNS[corpus.modality], corpus.name)
    rows = np.array([hit.row])
    if isinstance(column, RaggedColumn):
        return draw_log_mel(column.take(rows)[0][0]), None
    assert isinstance(column, FixedColumn)
    media = column.take(rows)[0]
    # Pen paths are white on black for the model; the page shows them black on white.
    is_drawn = "pen" in corpus.manifest.get("preprocessing", {})
    return (255 - media if is_drawn else media), None
