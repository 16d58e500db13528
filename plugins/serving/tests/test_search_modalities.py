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
import scipy.io.wavfile
import torch
import yaml
from PIL import Image

from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.format import (
    manifest_digest,
    tensor_field,
    write_corpus_manifest,
    write_shard,
)
from pipelines.data.tokenizer.training import load_tokenizer
from pipelines.data.transforms.text import encode_captions
from pipelines.serving.bundle import open_predictor
from pipelines.training.evaluation.inference import InferenceRunner, split_inputs
from pipelines.training.loading.task_columns import tower_column
from pipelines.training.runs.model_source import resolve_model
from skillnet.model import SkillNet
from skillnet.skills import SkillPlan, Task, default_tasks, known_tasks
from skillnet_corpora.demo.strokes import draw_pen_paths
from skillnet_platform.errors import UserError
from skillnet_serving.retrieval.corpus_search import choose_search_task
from skillnet_serving.search import SearchConfig, read_query, search_corpus, show_search
from tests.helpers.readable_corpora import STROKES, config, write_corpora
from tests.helpers.video_files import encode_video

#: str of the searched rows -> corpus.
SEARCHED: dict[str, str] = {
    "text": "headings",
    "sound": "syllables",
    "image": "drawings",
    "video": "strokes",
    "code": "functions",
}


def retrieval(candidate: str, query: str = "text") -> Task:
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
    splits = {}
    for split, opened in corpus.splits.items():
        table = edit(data, opened.table().combine_chunks())
        shard = write_shard(table, data / name / f"{split}-edited.arrow")
        splits[split] = {"rows": len(table), "shards": [shard]}
    write_corpus_manifest(data / name, corpus.manifest | {"splits": splits})


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
def test_rows_of_every_modality_are_ranked_and_shown(modality, data, tmp_path, save_run):
    run = save_run({"searched": retrieval(modality)}, {"searched": SEARCHED[modality]})
    page = tmp_path / "page.html"
    found = search_corpus(
        SearchConfig(["红色"], None, "searched", run, str(data), ["test"], html=str(page), top=3)
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


def ask(modality: str, folder: Path) -> dict[str, object]:
    """Return the settings of a search with a text, or with a file of a modality."""
    if modality == "text":
        return {"query": ["红色"]}
    file = folder / {"image": "a.png", "sound": "a.wav", "video": "a.mp4", "code": "a.py"}[modality]
    if modality == "image":
        Image.new("RGB", (60, 40), "red").save(file)
    elif modality == "sound":
        wave = 9000 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
        scipy.io.wavfile.write(file, 16000, wave.astype(np.int16))
    elif modality == "video":
        file.write_bytes(encode_video(draw_pen_paths([STROKES["横"], STROKES["竖"]])))
    else:
        file.write_text("def send(self, message):\n    return self.post(message)\n")
    return {"query": [], "file": str(file)}


@pytest.mark.parametrize(
    ("towers", "asked", "ranked"),
    [
        (("image", "image"), "image", "candidate"),
        (("video", "video"), "video", "candidate"),
        (("text", "text"), "text", "candidate"),
        (("sound", "text"), "sound", "candidate"),
        (("sound", "text"), "text", "query"),
        (("text", "image"), "image", "query"),
        (("text", "image"), "text", "candidate"),
        (("text", "code"), "code", "query"),
    ],
    ids=str,
)
def test_the_other_tower_ranks_rows_or_captions_for_a_file(
    towers, asked, ranked, data, tmp_path, save_run
):
    task = retrieval(towers[1], towers[0])
    corpus = open_corpus(data / SEARCHED[task.towers[task.row_tower].modality])
    run = save_run({"searched": task}, {"searched": corpus.name})
    settings = {"model": run, "data": str(data), "splits": ["test"], "top": 3}
    found = search_corpus(SearchConfig(**ask(asked, tmp_path), **settings))
    assert found.task == "searched"
    assert found.query == {"text": "红色"}.get(asked) or found.query.startswith("a.")
    # The scores are the cosines to the rows, or their first captions, that the other tower reads.
    model = SkillNet.from_pretrained(tmp_path / "run" / "model")
    inputs = split_inputs(
        corpus.splits["test"].table(),
        task.towers[ranked],
        model.config,
        "test",
        column=tower_column(task, ranked),
    )
    vectors = InferenceRunner(model).embed("searched", ranked, inputs)
    item = read_query(SearchConfig(**ask(asked, tmp_path)))
    predictor = open_predictor(resolve_model(run), data)
    tower = {"query": "candidate"}.get(ranked, "query")
    query = predictor.embed_row(predictor.read_row(item, "searched", tower), "searched", tower)
    best = np.sort(vectors @ query)[::-1][:3]
    np.testing.assert_allclose([hit.score for hit in found.hits], best, atol=1e-5)


def test_queries_that_no_task_reads_have_one_message(data, tmp_path, save_run):
    tasks = {"seen": retrieval("image"), "coded": retrieval("code")}
    run = save_run(tasks, {"seen": "drawings", "coded": "functions"})

    def fails(message: str, **settings: object) -> None:
        with pytest.raises(UserError, match=message):
            search_corpus(SearchConfig(model=run, data=str(data), **settings))

    movie = ask("video", tmp_path)
    fails(r"--model: none of its tasks \(coded, seen\) ranks rows for video", **movie)
    fails("seen: the task reads text and image, the query is video", task="seen", **movie)
    (tmp_path / "b.py").write_text("def f(x):\n    return x\n\n\ndef g(x):\n    return x\n")
    fails("b.py: 2 functions, expected one", query=[], file=str(tmp_path / "b.py"))
    fails("c.png: no such file", query=[], file=str(tmp_path / "c.png"))
    (tmp_path / "d.dat").write_bytes(b"?")
    fails("d.dat: unknown file type", query=[], file=str(tmp_path / "d.dat"))
    with pytest.raises(UserError, match="the query is also a text"):
        SearchConfig(["红"], "a.png")
    with pytest.raises(UserError, match="the query is empty; give a text, or --file"):
        SearchConfig()


@pytest.mark.parametrize(
    "source",
    [
        "def outer(x):\n    def inner(y):\n        return y\n    return inner(x)\n",
        "async def outer(x):\n    async def a():\n        def b(): pass\n    def c(): pass\n",
        "def outer(x):\n    class Inner:\n        def method(self): pass\n    return Inner\n",
        "class Outer:\n    def method(self):\n        if self:\n            def inner(): pass\n",
        "if True:\n    def outer():\n        for _ in (1, 2):\n            def inner(): pass\n",
    ],
    ids=["inner", "async", "class", "method", "block"],
)
def test_a_function_with_inner_functions_is_one_query(source, data, tmp_path, save_run):
    run = save_run({"searched": retrieval("code", "code")}, {"searched": "functions"})
    file = tmp_path / "a.py"
    file.write_text(source)
    settings = {"model": run, "data": str(data), "splits": ["test"], "top": 3}
    found = search_corpus(SearchConfig([], str(file), **settings))
    assert [hit.rank for hit in found.hits] == [1, 2, 3]
    # The query is the complete function, as a row of a corpus is.
    predictor = open_predictor(resolve_model(run), data)
    item = read_query(SearchConfig([], str(file)))
    functions = predictor.preprocess(item, "searched", "query")
    assert len(functions) > 1
    row = predictor.read_row(item, "searched", "query")
    assert row.tolist() == functions[0][1].tolist()


def test_a_query_of_another_language_is_doubted(data, tmp_path, save_run, capsys):
    run = save_run({"searched": retrieval("image")}, {"searched": "drawings"})
    captions = open_corpus(data / "drawings").splits["test"].table()["captions"].to_pylist()
    page = tmp_path / "page.html"
    settings = {"model": run, "data": str(data), "html": str(page)}
    for known in {caption for row in captions for caption in row}:
        assert search_corpus(SearchConfig([known], **settings)).caution == ""
    for unknown in ("red heart", "сердце", "ハート型", "❤", "zzzz"):
        found = search_corpus(SearchConfig([unknown], **settings))
        assert "tokens of the query occur in no text of drawings, perhaps" in found.caution
        assert found.caution in page.read_text(encoding="utf-8")
        show_search(found)
        assert found.caution in " ".join(capsys.readouterr().err.split())


def test_rows_without_captions_cannot_be_ranked_by_them(tmp_path, save_run):
    folder = write_corpora(tmp_path / "corpora")
    run = save_run({"seen": retrieval("image")}, {"seen": "drawings"})
    names = ["caption_tokens", "captions"]
    edit_corpus(folder, "drawings", lambda _, table: table.drop_columns(names))
    query = ask("image", tmp_path)
    with pytest.raises(UserError, match="drawings: rows of test have no captions"):
        search_corpus(SearchConfig(model=run, data=str(folder), splits=["test"], **query))


def test_videos_are_shown_as_stored_unless_a_pen_drew_them(tmp_path, save_run):
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
        search_corpus(
            SearchConfig(["横"], None, "searched", run, str(folder), ["test"], html=str(page))
        )
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


def test_rows_without_captions_are_named_by_transcript_or_key(tmp_path, save_run):
    """A split for prediction has no captions, and audio of a CTC task has transcripts."""
    folder = write_corpora(tmp_path / "corpora")
    edit_corpus(folder, "drawings", lambda _, table: table.drop_columns(["captions"]))
    tasks = {"heard": retrieval("sound"), "seen": retrieval("image")}
    run = save_run(tasks, {"heard": "syllables", "seen": "drawings"})
    heard = search_corpus(SearchConfig(["一"], None, "heard", run, str(folder), ["test"])).hits[0]
    seen = search_corpus(SearchConfig(["一"], None, "seen", run, str(folder), ["test"])).hits[0]
    assert re.fullmatch(r"s\d+", heard.caption)
    assert seen.caption == seen.key


def test_corpora_that_cannot_be_searched_are_named(tmp_path, save_run):
    tasks = {
        "views": retrieval("image", "image"),
        "crossed": retrieval("video"),
        "emptied": retrieval("code"),
    }
    folder = write_corpora(tmp_path / "corpora")
    edit_corpus(folder, "functions", lambda _, table: table.slice(0, 0))
    run = save_run(tasks, {"views": "drawings", "crossed": "syllables", "emptied": "functions"})

    def fails(task: str, message: str, data: str = str(folder), **more: list[str]) -> None:
        with pytest.raises(UserError, match=message):
            search_corpus(SearchConfig(["一"], None, task, run, data, **more))

    fails("views", "views: the task reads image, the query is text.*: crossed, emptied")
    fails("crossed", "crossed: the task ranks video, but the corpus syllables holds sound")
    fails("emptied", "functions: no rows in train, validation, test")
    fails("emptied", "has no split 'tset'", splits=["tset"])
    fails("emptied", "missing. Run `skillnet prepare ", data="/nowhere")
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
        assert choose_search_task(None, tasks, "text") == chosen
    else:
        with pytest.raises(UserError, match=re.escape(chosen)):
            choose_search_task(None, tasks, "text")
