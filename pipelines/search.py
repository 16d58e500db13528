"""``skillnet search``: rank pictures, clips or functions for a Chinese text."""

import re
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, data_root, run_root
from skillnet_platform.storage.location import place

if TYPE_CHECKING:
    from pipelines.shards.dataset import PreparedCorpus
from pipelines.serving.retrieval_index import build_retrieval_index


@dataclass
class SearchConfig:
    """Search a prepared corpus with a text.

    Args:
        query: what to look for, in Chinese; several words are one query.
        task: text_to_image, text_to_video or text_to_code.
        model: a registry address, a run's name, id or folder, a checkpoint, or a saved model.
        data: directory or URI of prepared corpora; by default corpora below the run root.
        splits: which splits to search; by default all but pretraining. The vectors of their rows
            may take 4 GiB: two million rows at a width of 512.
        top: how many results.
        html: the page to write; by default below searches in the run root.
        open: open the page in a browser.
        precision: auto, bf16, fp32 or fp64.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    query: list[str] = positional()
    task: str = "text_to_image"
    model: str = "models:/skillnet@champion"
    data: str | None = None
    splits: list[str] | None = None
    top: int = 12
    html: str | None = None
    open: bool = False
    precision: str = "auto"
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"top must be at least 1, got {self.top}")
        if not " ".join(self.query).strip():
            raise UserError("the query is empty; say what to look for")


@dataclass(frozen=True)
class SearchHit:
    """One result: rank from 1, cosine similarity, and the row of the corpus."""

    rank: int
    score: float
    key: str
    split: str
    caption: str
    captions: list[str]
    row: int


@dataclass(frozen=True)
class SearchResult:
    """What a search gives.

    Args:
        query: the text.
        task: the task whose space was searched.
        model: the model, with its version if it has one.
        searched: number of candidates.
        seconds: of embedding the query and ranking, without loading.
        hits: best first; a row for each distinct key.
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
    """Rank the rows of a task's corpus for a text and write the page.

    Raises:
        UserError: no such model, task, corpus or split.
    """
    from pipelines.evaluation.evaluator import locate_task_corpus
    from pipelines.runs import model_source
    from pipelines.serving.bundle import open_predictor
    from pipelines.shards.dataset import open_corpus
    from skillnet.skills import find_task

    source = model_source.resolve_model(config.model, config.tracking_uri)
    data = place(config.data, data_root())
    predictor = open_predictor(source, data, config.precision)
    tasks = predictor.model.config.tasks
    if find_task(config.task, tasks).objective != "retrieval":
        searchable = [name for name, spec in tasks.items() if spec.objective == "retrieval"]
        raise UserError(
            f"{config.task} ranks nothing; search with one of {', '.join(searchable) or 'none'}"
        )
    corpus = open_corpus(locate_task_corpus(data, config.task, source.corpora))
    splits = _splits(corpus, config.splits)
    vectors = build_retrieval_index(predictor, source, config.task, corpus, splits)
    begin = time.monotonic()
    query = " ".join(config.query).strip()
    scores = vectors @ predictor.embed_texts(config.task, [query])[0]
    hits = _hits(corpus, splits, scores, config.top)
    seconds = time.monotonic() - begin
    name = source.name if source.version is None else f"{source.name} (version {source.version})"
    page = Path(config.html) if config.html else _page_path(query, config.task)
    write_search_page(page, query, config.task, name, corpus, hits, len(vectors))
    return SearchResult(query, config.task, name, len(vectors), seconds, hits, page.absolute())


def write_search_page(
    path: Path,
    query: str,
    task: str,
    model: str,
    corpus: "PreparedCorpus",
    hits: Sequence[SearchHit],
    searched: int,
) -> None:
    """Write the result as one HTML page with its pictures inside."""
    from pipelines.serving.search_page import ResultCard, render_search_page

    facts = [
        ("task", task),
        ("model", model),
        ("searched", f"{searched:,} rows of {corpus.name}"),
        ("on", time.strftime("%Y-%m-%d")),
    ]
    cards = []
    for hit in hits:
        more = [caption for caption in hit.captions if caption != hit.caption]
        details = ([" · ".join(more)] if more else []) + [f"{hit.key} · {hit.split}"]
        media, code = _shown(corpus, hit)
        cards.append(ResultCard(hit.rank, hit.score, hit.caption, details, media, code))
    with atomic_write(path, "w") as stream:
        stream.write(render_search_page(query, cards, facts, credit_line(corpus)))


def credit_line(corpus: "PreparedCorpus") -> str:
    """Who made what a built-in corpus shows, and its licences; "" for others."""
    from pipelines.corpora import BUILT_IN, find_corpus

    if corpus.name not in BUILT_IN:
        return ""
    archives = find_corpus(corpus.name).archives
    return f"From {'; '.join(f'{a.requirement}: {a.licence}' for a in archives)}."


def show_search(found: SearchResult) -> None:
    """Print the ranked table."""
    rows = [
        [hit.rank, f"{hit.score:.3f}", _short(hit.caption), hit.key, hit.split]
        for hit in found.hits
    ]
    columns = ["", "similarity", "caption", "key", "split"]
    console.table(f"{found.query} · {found.task} · {found.model}", columns, rows)
    console.note(
        f"{found.searched:,} rows ranked in {1000 * found.seconds:.0f} ms; page: {found.page}"
    )


def _splits(corpus: "PreparedCorpus", wanted: Sequence[str] | None) -> list[str]:
    if wanted is None:
        return [name for name in corpus.splits if name != "pretrain"]
    for name in wanted:
        if name not in corpus.splits:
            raise UserError(
                f"corpus {corpus.name} has no split {name!r}; it has {', '.join(corpus.splits)}"
            )
    return list(dict.fromkeys(wanted))


def _hits(
    corpus: "PreparedCorpus", splits: Sequence[str], scores: np.ndarray, top: int
) -> list[SearchHit]:
    ends = np.cumsum([corpus.splits[name].rows for name in splits])
    hits: list[SearchHit] = []
    for rank in np.argsort(-scores, kind="stable")[:top]:
        number = int(np.searchsorted(ends, rank, side="right"))
        name = splits[number]
        row = int(rank) - int(ends[number]) + corpus.splits[name].rows
        split = corpus.splits[name]
        captions = split.column("captions")[row].as_py()
        key = split.column("key")[row].as_py()
        caption = captions[0] if captions else key
        hits.append(
            SearchHit(len(hits) + 1, float(scores[rank]), key, name, caption, list(captions), row)
        )
    return hits


def _shown(corpus: "PreparedCorpus", hit: SearchHit) -> tuple[np.ndarray | None, str | None]:
    """The picture or clip of a hit, or its code."""
    from pipelines.shards.columns import FixedColumn, open_column

    table: Any = corpus.splits[hit.split].table()
    for name in ("pixels", "frames"):
        if name in table.column_names:
            column = open_column(table, name, corpus.name)
            if isinstance(column, FixedColumn):
                media = column.take(np.array([hit.row]))[0]
                # Clips are white on black for the model; on paper it is the other way round.
                return (255 - media if corpus.modality == "video" else media), None
    code = table.column("code")[hit.row].as_py() if "code" in table.column_names else None
    return None, code


def _page_path(query: str, task: str) -> Path:
    stem = re.sub(r"[^\w]+", "-", query).strip("-")[:40] or "query"
    return run_root() / "searches" / f"{task}-{stem}.html"


def _short(text: str, longest: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


@command(
    SearchConfig,
    description="Rank the pictures, clips or functions of a prepared corpus for a Chinese "
    "text, as a table and as an HTML page with thumbnails.",
    example='skillnet search "红色的心" --open\n'
    'skillnet search "横、竖、撇、捺" --task text_to_video\n'
    'skillnet search "发送消息给用户" --task text_to_code --top 5',
    show=show_search,
    resources=lambda config: request_model(config.model, config.data),
)
def main(config: SearchConfig) -> SearchResult:
    """Run ``skillnet search``."""
    found = search_corpus(config)
    if config.open and not webbrowser.open(found.page.as_uri()):
        console.warn(f"no browser could be started; open {found.page} by hand")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
