"""``skillnet search``: rank the rows of a corpus for a text or a file of any modality."""

import re
import time
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.training.config.resources import request_model
from skillnet_platform import console
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.config.bounds import PositiveCount, require_bounds
from skillnet_platform.errors import UserError
from skillnet_platform.storage import open_output, run_root
from skillnet_platform.terminal_text import shorten_text

if TYPE_CHECKING:
    from pipelines.serving.inputs import PredictionItem
    from skillnet_serving.retrieval.corpus_search import SearchHit


@dataclass
class SearchConfig:
    """Search a prepared corpus with a text or a file.

    Args:
        query: text in Chinese; several arguments are one query.
        file: image, audio, video, Python file or text (.txt) as the query, instead of a text.
        task: retrieval task of the model that reads the modality of the query: text_to_image,
            text_to_video, text_to_code, or a task of your own; by default the only one, or
            text_to_image. One tower of the task reads the query; rows are ranked by the other one,
            which reads them or their first captions.
        model: registry address, name, id or folder of a run, checkpoint, or saved model.
        data: directory or URI of prepared corpora; by default those of the model's run, else
            corpora below the run root.
        splits: splits to search; by default all except pretrain. The embeddings of their rows may
            take 4 GiB: two million rows at a width of 512, or more by ``vectors``.
        vectors: numbers of the index: float32; int8, in a quarter of its memory; binary, in a 32nd.
            The share of the ten best rows that they find is printed.
        top: number of results.
        html: page to write; by default below searches in the run root.
        open: open the page in a browser.
        precision: auto, bf16, fp32 or fp64.
        tracking_uri: MLflow tracking URI; by default as in training.
    """

    query: list[str] = positional_field([])
    file: str | None = None
    task: str | None = None
    model: str = "models:/skillnet@champion"
    data: str | None = None
    splits: list[str] | None = None
    vectors: Literal["float32", "int8", "binary"] = "float32"
    top: PositiveCount = 12
    html: str | None = None
    open: bool = False
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        require_bounds(self)
        text = " ".join(self.query).strip()
        if self.file is not None and text:
            raise UserError(f"--file {self.file}: the query is also a text. Give one of them")
        if self.file is None and not text:
            raise UserError("the query is empty; give a text, or --file")


@dataclass(frozen=True)
class SearchResult:
    """Result of :func:`search_corpus`.

    Args:
        query: text of the user, or name of the file.
        task: the retrieval task.
        model: name of the model, with its version if it has one.
        searched: number of searched rows.
        seconds: duration of the query's embedding and of the ranking, without loading.
        hits: best first.
        page: the HTML file.
        caution: why the ranking may be arbitrary; "" if nothing speaks for that.
        recall: share of the ten best rows of float32 vectors that int8 or binary ones find; None
            for float32, and if it was not measured.
    """

    query: str
    task: str
    model: str
    searched: int
    seconds: float
    hits: "list[SearchHit]"
    page: Path
    caution: str = ""
    recall: float | None = None


def search_corpus(config: SearchConfig) -> SearchResult:
    """Rank the rows of a task's corpus for a query, and write the page.

    Args:
        config: settings of the command.

    Raises:
        UserError: the model, the corpus, a split or the file is missing, the task does not rank
            rows for the query, or the corpus is of another modality.
    """
    from pipelines.serving.inputs import find_item_modality, named_errors, printable_name
    from pipelines.training.runs import model_source

    item = read_query(config)
    with named_errors(item.label):
        modality = find_item_modality(item)
    query = item.text or printable_name(Path(item.name).name)
    source = model_source.resolve_model(config.model, config.tracking_uri)
    # torch loads here: --help and wrong names do not need it.
    from pipelines.serving.bundle import open_predictor
    from skillnet_serving.retrieval.corpus_search import (
        CorpusSearch,
        choose_search_task,
        find_query_tower,
    )
    from skillnet_serving.retrieval.search_page import preview_query

    data = source.find_corpora(config.data)
    predictor = open_predictor(source, data, config.precision)
    task = choose_search_task(config.task, predictor.model.config.tasks, modality)
    tower = find_query_tower(predictor.model.config.tasks[task], modality)
    assert tower is not None
    # Before the corpus is embedded, which takes long: the query may be unusable.
    row = predictor.read_row(item, task, tower)
    search = CorpusSearch(predictor, source, data, task, config.splits, modality, config.vectors)
    search.open_index()
    # The time excludes loading and indexing, which happen once for a model and a corpus.
    begin = time.monotonic()
    hits = search.rank_rows(search.embed_query(row), config.top)
    seconds, doubt = time.monotonic() - begin, search.describe_doubt(row)
    page = Path(config.html) if config.html else _default_page(query, task)
    with open_output(page, "w") as stream:
        preview = preview_query(item, row, search.modality)
        stream.write(search.render_hits(query, hits, preview=preview, doubt=doubt))
    path = page.absolute()
    found = search.num_rows, seconds, hits, path, doubt, search.index.recall
    return SearchResult(query, task, search.model, *found)


def read_query(config: SearchConfig) -> "PredictionItem":
    """Return the text or the file of a command line as an item.

    Args:
        config: settings of the command.

    Raises:
        UserError: the file is missing, unreadable or empty.
    """
    from pipelines.serving.inputs import PredictionItem, read_input_item

    if config.file is not None:
        return read_input_item(config.file)
    text = " ".join(config.query).strip()
    return PredictionItem(text, text=text)


def show_search(result: SearchResult) -> None:
    """Print the ranked table.

    Args:
        result: result of :func:`search_corpus`.
    """
    rows = [
        [
            hit.rank,
            f"{hit.score:.3f}",
            shorten_text(" ".join(hit.caption.split()), 60),
            hit.key,
            hit.split,
        ]
        for hit in result.hits
    ]
    columns = ["", "similarity", "caption", "key", "split"]
    console.print_table(f"{result.query} · {result.task} · {result.model}", columns, rows)
    if result.caution:
        console.print_warning(result.caution)
    console.print_note(
        f"{result.searched:,} rows ranked in {1000 * result.seconds:.0f} ms; page: {result.page}"
    )


def _default_page(query: str, task: str) -> Path:
    # A query may contain a slash. A Chinese character takes three bytes of the 255 that file
    # systems allow for a name.
    stem = re.sub(r"[^\w]+", "-", query).strip("-")[:40] or "query"
    return run_root() / "searches" / f"{task}-{stem}.html"


@command(
    SearchConfig,
    description="Rank the images, videos, recordings, functions or texts of a prepared corpus for "
    "a Chinese text or a file; print a table, and write an HTML page with thumbnails.",
    example='skillnet search "红色的心" --open\n'
    'skillnet search "横、竖、撇、捺" --task text_to_video\n'
    'skillnet search "发送消息给用户" --task text_to_code --top 5\n'
    "skillnet search --file heart.png",
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
