"""``skillnet search``: rank the rows of a corpus of any modality for a Chinese text."""

import re
import time
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.config.resources import request_model
from pipelines.serving.retrieval_index import build_retrieval_index
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.config.bounds import PositiveCount, require_bounds
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root, open_output, run_root
from skillnet_platform.storage.location import parse_location

if TYPE_CHECKING:
    from pipelines.shards.dataset import PreparedCorpus
    from skillnet.skills import Task

#: Task of a search if the model has several.
DEFAULT_TASK = "text_to_image"


@dataclass
class SearchConfig:
    """Search a prepared corpus with a text.

    Args:
        query: text in Chinese; several arguments are one query.
        task: retrieval task of the model whose query is a text: text_to_image, text_to_video,
            text_to_code, or a task of your own; by default the only one, or text_to_image.
        model: registry address, name, id or folder of a run, checkpoint, or saved model.
        data: directory or URI of prepared corpora; by default corpora below the run root.
        splits: splits to search; by default all except pretrain. The embeddings of their rows may
            take 4 GiB: two million rows at a width of 512.
        top: number of results.
        html: page to write; by default below searches in the run root.
        open: open the page in a browser.
        precision: auto, bf16, fp32 or fp64.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    query: list[str] = positional_field()
    task: str | None = None
    model: str = "models:/skillnet@champion"
    data: str | None = None
    splits: list[str] | None = None
    top: PositiveCount = 12
    html: str | None = None
    open: bool = False
    precision: str = "auto"
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        require_bounds(self)
        if not " ".join(self.query).strip():
            raise UserError("the query is empty; give a text")


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


@dataclass(frozen=True)
class SearchResult:
    """Result of :func:`search_corpus`.

    Args:
        query: text of the user.
        task: the retrieval task.
        model: name of the model, with its version if it has one.
        searched: number of searched rows.
        seconds: duration of the query's embedding and of the ranking, without loading.
        hits: best first.
        page: the HTML file.
    """

    query: str
    task: str
    model: str
    searched: int
    seconds: float
    hits: list[SearchHit]
    page: Path


def search_corpus(config: SearchConfig) -> SearchResult:
    """Rank the rows of a task's corpus for a text, and write the page.

    Args:
        config: of the command.

    Raises:
        UserError: the model, the corpus or a split is missing, the task does not rank rows for a
            text, or the corpus is of another modality.
    """
    # torch loads here, so that --help and usage errors stay fast.
    from pipelines.evaluation.evaluator import locate_task_corpus
    from pipelines.runs import model_source
    from pipelines.runs.vocabulary_match import check_corpus_vocabulary
    from pipelines.serving.bundle import open_predictor
    from pipelines.shards.dataset import open_corpus

    source = model_source.resolve_model(config.model, config.tracking_uri)
    data = parse_location(config.data, data_root())
    predictor = open_predictor(source, data, config.precision)
    task = _choose_task(config.task, predictor.model.config.tasks)
    corpus = open_corpus(locate_task_corpus(data, task, source.corpora))
    check_corpus_vocabulary(predictor.model, task, corpus)
    splits = _choose_splits(corpus, config.splits)
    vectors = build_retrieval_index(predictor, source, task, corpus, splits)
    # The time excludes loading and indexing, which happen once for a model and a corpus.
    begin = time.monotonic()
    query = " ".join(config.query).strip()
    scores = vectors @ predictor.embed_texts(task, [query])[0]
    hits = _rank_hits(corpus, splits, scores, config.top)
    seconds = time.monotonic() - begin
    name = source.name if source.version is None else f"{source.name} (version {source.version})"
    page = Path(config.html) if config.html else _default_page(query, task)
    write_search_page(page, query, task, name, corpus, hits, len(vectors))
    return SearchResult(query, task, name, len(vectors), seconds, hits, page.absolute())


def write_search_page(
    path: Path,
    query: str,
    task: str,
    model: str,
    corpus: "PreparedCorpus",
    hits: Sequence[SearchHit],
    searched: int,
) -> None:
    """Write the result of a search as one HTML page with embedded images.

    Args:
        path: of the page.
        query: text of the user.
        task: a retrieval task.
        model: name of the model.
        corpus: that was searched.
        hits: best first.
        searched: number of searched rows.
    """
    from pipelines.serving.search_page import ResultCard, render_search_page

    facts = [
        ("task", task),
        ("model", model),
        ("searched", f"{searched:,} rows of {corpus.name}"),
        ("date", time.strftime("%Y-%m-%d")),
    ]
    cards = []
    for hit in hits:
        others = [caption for caption in hit.captions if caption != hit.caption]
        details = ([" · ".join(others)] if others else []) + [f"{hit.key} · {hit.split}"]
        media, code = _load_content(corpus, hit)
        cards.append(ResultCard(hit.rank, hit.score, hit.caption, details, media, code))
    with open_output(path, "w") as stream:
        stream.write(render_search_page(query, cards, facts, credit_line(corpus)))


def credit_line(corpus: "PreparedCorpus") -> str:
    """Return authors and licences of the data of a built-in corpus; "" for other corpora.

    Args:
        corpus: that was searched.
    """
    from pipelines.corpora import BUILT_IN, find_corpus

    if corpus.name not in BUILT_IN:
        return ""
    archives = find_corpus(corpus.name).archives
    return f"From {'; '.join(f'{a.requirement}: {a.licence}' for a in archives)}."


def show_search(result: SearchResult) -> None:
    """Print the ranked table.

    Args:
        result: of :func:`search_corpus`.
    """
    rows = [
        [hit.rank, f"{hit.score:.3f}", _short(hit.caption), hit.key, hit.split]
        for hit in result.hits
    ]
    columns = ["", "similarity", "caption", "key", "split"]
    console.print_table(f"{result.query} · {result.task} · {result.model}", columns, rows)
    console.print_note(
        f"{result.searched:,} rows ranked in {1000 * result.seconds:.0f} ms; page: {result.page}"
    )


def _choose_task(given: str | None, tasks: "Mapping[str, Task]") -> str:
    """Return the task that ranks rows for a text.

    Args:
        given: name of the task, or None.
        tasks: of the model.

    Raises:
        UserError: it is no retrieval task, or its query is of another modality. Without a name:
            the model has no such task, or several.
    """
    from skillnet.skills import find_task

    def reads_text(spec: "Task") -> bool:
        return spec.objective == "retrieval" and spec.towers["query"].modality == "text"

    searchable = [name for name, each in tasks.items() if reads_text(each)]
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
    if reads_text(spec):
        return given
    reason = "is not a retrieval task"
    if spec.objective == "retrieval":
        reason = f"has a query of the modality {spec.towers['query'].modality}, not text"
    raise UserError(
        f"{given}: the task {reason}. Use one that ranks rows for a text: "
        f"{', '.join(searchable) or 'this model has none'}"
    )


def _choose_splits(corpus: "PreparedCorpus", names: Sequence[str] | None) -> list[str]:
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
    from pipelines.evaluation.inference import INPUT_COLUMNS
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


def _default_page(query: str, task: str) -> Path:
    # A query may contain a slash. A Chinese character takes three bytes of the 255 that file
    # systems allow for a name.
    stem = re.sub(r"[^\w]+", "-", query).strip("-")[:40] or "query"
    return run_root() / "searches" / f"{task}-{stem}.html"


def _short(text: str, max_length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


@command(
    SearchConfig,
    description="Rank the images, videos, recordings, functions or texts of a prepared corpus for "
    "a Chinese text; print a table, and write an HTML page with thumbnails.",
    example='skillnet search "红色的心" --open\n'
    'skillnet search "横、竖、撇、捺" --task text_to_video\n'
    'skillnet search "发送消息给用户" --task text_to_code --top 5',
    show=show_search,
    resources=lambda config: request_model(config.model, config.data),
)
def main(config: SearchConfig) -> SearchResult:
    """Run ``skillnet search``."""
    result = search_corpus(config)
    if config.open and not webbrowser.open(result.page.as_uri()):
        console.print_warning(f"no browser could be started; open {result.page} manually")
    return result


if __name__ == "__main__":
    raise SystemExit(main())
