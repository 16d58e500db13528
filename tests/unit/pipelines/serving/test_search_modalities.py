"""Search over rows of every modality: the ranked rows, their page, and corpora it cannot search."""

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image

from pipelines.corpora.base import tensor_field
from pipelines.search import SearchConfig, search_corpus
from pipelines.serving.corpus_search import choose_search_task
from pipelines.shards.dataset import open_corpus
from pipelines.shards.format import manifest_digest, write_shard
from pipelines.tokenizer.training import load_tokenizer
from pipelines.transforms.text import encode_captions
from skillnet.model import SkillNet
from skillnet.skills import Modality, SkillPlan, Task, default_tasks, known_tasks
from skillnet_platform.errors import UserError
from tests.helpers.readable_corpora import config, write_corpora

#: Modality of the searched rows -> corpus.
SEARCHED: dict[Modality, str] = {
    "text": "headings",
    "sound": "syllables",
    "image": "drawings",
    "video": "strokes",
    "code": "functions",
}


def retrieval(candidate: Modality, query: Modality = "text") -> Task:
    towers = {"query": query, "candidate": candidate}
    return Task("retrieval", {k: SkillPlan(("general", m), m) for k, m in towers.items()})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpora(tmp_path_factory.mktemp("search") / "corpora")
    edit_corpus(folder, "syllables", caption_rows)
    edit_corpus(folder, "headings", caption_rows)
    return folder


def edit_corpus(data: Path, name: str, edit: Callable[[Path, pa.Table], pa.Table]) -> None:
    """Replace every split of a corpus by the table that ``edit`` returns."""
    corpus = open_corpus(data / name)
    manifest = corpus.manifest
    for split, opened in corpus.splits.items():
        table = edit(data, opened.table().combine_chunks())
        shard = write_shard(table, data / name / f"{split}-edited.arrow")
        manifest["splits"][split] = {"rows": len(table), "shards": [shard]}
    manifest["digest"] = manifest_digest(manifest)
    (data / name / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def caption_rows(data: Path, table: pa.Table) -> pa.Table:
    """Give each row a caption of its own."""
    if "captions" in table.column_names:
        return table
    captions = [[f"第{number}个的说明"] for number in range(len(table))]
    tokens = encode_captions(load_tokenizer(data / "tokenizer.json"), captions)
    return table.append_column("captions", pa.array(captions)).append_column(
        "caption_tokens", tokens
    )


@pytest.fixture
def save_run(tmp_path: Path, run_root: Path) -> Callable[..., str]:
    """Save an untrained model of some tasks as a run that read some corpora."""

    def save(tasks: dict[str, Task], corpora: dict[str, str]) -> str:
        torch.manual_seed(0)
        SkillNet(replace(config(), tasks=tasks)).save_pretrained(tmp_path / "run" / "model")
        settings = {
            "training": {},
            "tasks": {task: {"corpus": corpus} for task, corpus in corpora.items()},
        }
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        return str(tmp_path / "run")

    return save


@pytest.mark.parametrize("modality", SEARCHED)
def test_rows_of_every_modality_are_ranked_and_shown(
    modality: Modality, data: Path, tmp_path: Path, save_run: Callable[..., str]
) -> None:
    run = save_run({"searched": retrieval(modality)}, {"searched": SEARCHED[modality]})
    page = tmp_path / "page.html"
    found = search_corpus(
        SearchConfig(["红色"], "searched", run, str(data), ["test"], html=str(page), top=3)
    )
    rows = open_corpus(data / SEARCHED[modality]).splits["test"].table()
    assert found.searched == len(rows)
    assert [hit.rank for hit in found.hits] == [1, 2, 3]
    for hit in found.hits:
        assert hit.captions == rows["captions"][hit.row].as_py()
    html = page.read_text(encoding="utf-8")
    assert len(re.findall("<li>", html)) == 3
    shows_image = modality in ("sound", "image", "video")
    assert len(re.findall('<img src="data:image/png', html)) == 3 * shows_image
    if modality in ("text", "code"):
        assert rows[modality][found.hits[0].row].as_py().split("\n")[0] in html


def test_videos_are_shown_as_stored_unless_a_pen_drew_them(
    tmp_path: Path, save_run: Callable[..., str]
) -> None:
    """Pen paths are black on white on the page; films of a user keep their colours."""
    folder = write_corpora(tmp_path / "corpora")
    edit_corpus(folder, "strokes", coloured_clips)
    run = save_run({"searched": retrieval("video")}, {"searched": "strokes"})
    page = tmp_path / "page.html"
    for preprocessing in ({"video_channels": 3}, {"pen": 0.055}):
        path = folder / "strokes" / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8")) | {"preprocessing": preprocessing}
        manifest["digest"] = manifest_digest(manifest)
        path.write_text(json.dumps(manifest), encoding="utf-8")
        search_corpus(SearchConfig(["横"], "searched", run, str(folder), ["test"], html=str(page)))
        (shown, *_) = re.findall('data:image/png;base64,([^"]+)', page.read_text(encoding="utf-8"))
        with Image.open(io.BytesIO(base64.b64decode(shown))) as image:
            colour = image.convert("RGB").getpixel((0, 0))
        assert colour == ((55, 255, 255) if "pen" in preprocessing else (200, 0, 0))


def coloured_clips(data: Path, table: pa.Table) -> pa.Table:
    """Replace all clips by red ones."""
    shape = (8, 32, 32, 3)
    red = np.broadcast_to(np.array([200, 0, 0], np.uint8), (len(table), *shape))
    column = pa.FixedSizeListArray.from_arrays(pa.array(red.ravel()), int(np.prod(shape)))
    return table.set_column(
        table.column_names.index("frames"), tensor_field("frames", pa.uint8(), shape), column
    )


def test_rows_without_captions_are_named_by_transcript_or_key(
    tmp_path: Path, save_run: Callable[..., str]
) -> None:
    """A split for prediction has no captions, and audio of a CTC task has transcripts."""
    folder = write_corpora(tmp_path / "corpora")
    edit_corpus(folder, "drawings", lambda _, table: table.drop_columns(["captions"]))
    tasks = {"heard": retrieval("sound"), "seen": retrieval("image")}
    run = save_run(tasks, {"heard": "syllables", "seen": "drawings"})
    heard = search_corpus(SearchConfig(["一"], "heard", run, str(folder), ["test"])).hits[0]
    seen = search_corpus(SearchConfig(["一"], "seen", run, str(folder), ["test"])).hits[0]
    assert re.fullmatch(r"s\d+", heard.caption)
    assert seen.caption == seen.key


def test_corpora_that_cannot_be_searched_are_named(
    tmp_path: Path, save_run: Callable[..., str]
) -> None:
    tasks = {
        "views": retrieval("image", "image"),
        "crossed": retrieval("video"),
        "emptied": retrieval("code"),
    }
    folder = write_corpora(tmp_path / "corpora")
    edit_corpus(folder, "functions", lambda _, table: table.slice(0, 0))
    run = save_run(tasks, {"views": "drawings", "crossed": "syllables", "emptied": "functions"})

    def fails(task: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            search_corpus(SearchConfig(["一"], task, run, str(folder)))

    fails("views", "views: the task has a query of the modality image.*: crossed, emptied")
    fails("crossed", "crossed: the task ranks video, but the corpus syllables holds sound")
    fails("emptied", "functions: no rows in train, validation, test")
    run = save_run(default_tasks(), {"text_classification": "headings"})
    fails("text_classification", "text_classification: the task is not a retrieval task")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["text_to_sound", "sound_classification"], "text_to_sound"),
        (["text_to_video", "text_to_image"], "text_to_image"),
        (["text_to_video", "text_to_code"], "--task: text_to_video, text_to_code rank rows"),
        (["text_classification"], "none of its tasks (text_classification) ranks rows"),
    ],
)
def test_the_task_of_a_search_without_a_name(names: list[str], chosen: str) -> None:
    tasks = {name: known_tasks()[name] for name in names}
    if chosen in names:
        assert choose_search_task(None, tasks) == chosen
    else:
        with pytest.raises(UserError, match=re.escape(chosen)):
            choose_search_task(None, tasks)
