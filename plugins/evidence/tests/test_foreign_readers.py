"""Readers of other tools' files, each with files that the tool wrote: see data/README.md."""

import contextlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skillnet_evidence.__main__ import main
from skillnet_evidence.comparison import SystemComparison, compare_systems
from skillnet_evidence.errors import EvidenceError
from skillnet_evidence.readers.formats import read_lines
from skillnet_evidence.readers.lines import ReadOptions
from skillnet_evidence.scores import build_runs

DATA = Path(__file__).parent / "data"
SAMPLES = "bigram/samples_next_word_running_*.jsonl"


def compare_files(*sources: str | Path, **options: object) -> SystemComparison:
    return compare_systems(build_runs(read_lines(sources, ReadOptions(**options))))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return shutil.copytree(DATA, tmp_path / "data")


def find_one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def edit_json(path: Path, change: Callable[[dict], object]) -> Path:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize("name", ["lm-eval", "inspect", "mteb"])
def test_formats_are_found_by_content(name: str) -> None:
    assert read_lines([DATA / name.replace("-", "_")]).file_format == name


# -- lm-evaluation-harness -----------------------------------------------------------------


def test_samples_of_lm_eval_have_the_scores_that_it_reports() -> None:
    found = compare_files(DATA / "lm_eval")
    assert list(found.systems) == ["bigram", "trigram", "unigram"]
    for path in (DATA / "lm_eval").glob("*/results_*.json"):
        report = json.loads(path.read_text())
        for task in ("next_word_running", "next_word_keeping"):
            score = found.scores[report["model_name"], task, "test"].value
            assert score == pytest.approx(report["results"][task]["acc,none"])
    assert found.samples["bigram", "next_word_running", "test"].units == 24


def test_metric_tasks_and_units_of_lm_eval_can_be_chosen() -> None:
    other = compare_files(DATA / "lm_eval", metrics=["acc_norm"], tasks=["next_word_running"])
    assert other.tasks == ["next_word_running"]
    assert other.metrics["next_word_running"].name == "acc_norm"
    pages = compare_files(DATA / "lm_eval", unit="page")
    assert pages.samples["bigram", "next_word_running", "test"].units == 3
    joined = compare_files(DATA / "lm_eval", unit="task")
    assert joined.tasks == ["next_word"]
    assert joined.samples["bigram", "next_word", "test"].units == 2
    named = compare_files(DATA / "lm_eval", system="config.model_args")
    assert any("trigram" in label for label in named.systems)


def test_paired_differences_of_lm_eval_stand_beside_unpaired_ones(capsys):
    assert main(["compare", str(DATA / "lm_eval"), "--tasks", "next_word_keeping"]) == 0
    table = capsys.readouterr().out.partition("What the pairing of rows is worth")[2]
    cells = table.split("| unigram − bigram | ")[1].split(" | ")
    acc = {
        name: np.array(
            [
                json.loads(line)["acc"]
                for path in (DATA / "lm_eval" / name).glob("samples_next_word_keeping_*")
                for line in path.read_text().splitlines()
            ]
        )
        for name in ("unigram", "bigram")
    }
    one, two = acc["unigram"], acc["bigram"]
    # The formula of its comparator: the root of the sum of squared standard errors.
    error = np.hypot(one.std(ddof=1), two.std(ddof=1)) / np.sqrt(len(one))
    low = 100 * (one.mean() - two.mean() - 1.96 * error)
    assert f"({low:+.1f} to ".replace("-", "−") in cells[2]
    paired = (one - two).std(ddof=1) / np.sqrt(len(one))
    assert float(cells[3].split()[0]) == pytest.approx((error / paired) ** 2, abs=0.051)
    assert error > 1.3 * paired


def test_metrics_of_which_lower_is_better_count_as_errors(files: Path) -> None:
    for path in files.glob("lm_eval/*/results_*.json"):
        edit_json(
            path, lambda tree: tree["higher_is_better"]["next_word_running"].update(acc=False)
        )
    metric = compare_files(files / "lm_eval").metrics["next_word_running"]
    assert not metric.is_higher_better
    # The name of a task may have dots, as the path to a key has.
    for path in files.glob("lm_eval/*/results_*.json"):
        better = {"next.word": {"acc": False}}
        edit_json(path, lambda tree, better=better: tree.update(higher_is_better=better))
    for path in files.glob("lm_eval/*/samples_next_word_running_*"):
        path.rename(path.with_name(path.name.replace("next_word_running", "next.word")))
    dotted = compare_files(files / "lm_eval", tasks=["next.word"]).metrics["next.word"]
    assert not dotted.is_higher_better


def test_answers_of_another_filter_are_no_further_rows(files: Path) -> None:
    """Tasks such as gsm8k are scored once per filter, and samples have a line for each."""
    for path in files.glob("lm_eval/*/samples_next_word_running_*"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        strict = [line | {"filter": "strict-match", "acc": 0.0} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *strict]))
    chosen = {"tasks": ["next_word_running"]}
    wanted = compare_files(DATA / "lm_eval", **chosen).scores
    assert compare_files(files / "lm_eval", **chosen).scores == wanted
    strict_only = compare_files(files / "lm_eval", metrics=["acc,strict-match"], **chosen)
    assert strict_only.scores["bigram", "next_word_running", "test"].value == 0
    lines = read_lines([files / "lm_eval"], ReadOptions(**chosen))
    assert "scored by acc,none; --metric takes acc_norm,none, acc,strict-match" in lines.notes[0]


def edit_line(path: Path, change: Callable[[dict], object]) -> None:
    lines = path.read_text().splitlines()
    sample = json.loads(lines[2])
    change(sample)
    path.write_text("\n".join([*lines[:2], json.dumps(sample), *lines[3:]]))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x.update(acc=[1, 2]), {}, r"line 3: acc: expected a number .* got list"),
        (lambda x: x.update(acc=40), {}, r"line 3, column score: 40 is above the weight 1"),
        (lambda x: x.update(acc=-40), {}, r"line 3, column score: -40 is below minus the weight"),
        (lambda x: x.update(doc_hash="f" * 64), {}, "have different rows of next_word_running"),
        (lambda x: x.update(doc_id=0), {}, "have different rows of next_word_running"),
        (lambda x: None, {"unit": "chapter"}, r"--unit chapter: no text or number; keys: choices,"),
        (lambda x: None, {"metrics": ["f1"]}, r"by --metric; it has: acc,none, acc_norm,none"),
        (lambda x: None, {"tasks": ["next_wrd"]}, "--tasks: unknown task 'next_wrd'; did you mean"),
        (lambda x: None, {"system": "colour"}, "--system colour: no text or number"),
    ],
)
def test_wrong_samples_are_named(change, options, message, files):
    edit_line(find_one(files / "lm_eval", SAMPLES), change)
    with pytest.raises(EvidenceError, match=message) as raised:
        compare_files(files / "lm_eval", **options)
    assert "\n" not in str(raised.value)


def test_damaged_samples_are_named(files: Path) -> None:
    path = find_one(files / "lm_eval", SAMPLES)
    text = path.read_text()
    for broken, message in (
        (text[:-40], "line 24: not JSON"),
        ("", "no samples"),
        ("[1]\n", "line 1: "),
    ):
        path.write_text(broken)
        with pytest.raises(EvidenceError, match=message):
            compare_files(files / "lm_eval")
    path.unlink()
    with pytest.raises(EvidenceError, match=r"samples\.jsonl: expected a name like samples_TASK"):
        edited = shutil.copy(
            find_one(files / "lm_eval", "unigram/samples_next_word_r*"), files / "samples.jsonl"
        )
        compare_files(edited)


# -- inspect -------------------------------------------------------------------------------


def test_logs_of_inspect_have_the_scores_that_it_reports() -> None:
    found = compare_files(*(DATA / "inspect").glob("*.eval"), unit="digits")
    carries = found.scores["mockllm/carries", "addition", "test"].value
    assert carries > 0.7 > 0.3 > found.scores["mockllm/forgets", "addition", "test"].value
    assert (found.seeds, found.samples["mockllm/carries", "addition", "test"].units) == (2, 3)
    (path,) = (DATA / "inspect").glob("*.json")
    report = json.loads(path.read_text())
    (score,) = report["results"]["scores"]
    alone = compare_files(path)
    assert alone.scores["mockllm/carries", "addition", "test"].value == pytest.approx(
        score["metrics"]["accuracy"]["value"]
    )


def pack_log(path: Path, log: Path, change: Callable[[dict], object] = lambda tree: None) -> Path:
    """An archive of the content of a JSON log, packed as older versions of inspect did."""
    tree = json.loads(log.read_text())
    change(tree)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("summaries.json", json.dumps(tree.pop("samples")))
        archive.writestr("header.json", json.dumps(tree))
    return path


def test_grades_of_inspect_are_numbers(files: Path) -> None:
    def set_grades(tree: dict) -> None:
        for sample, value in zip(tree["samples"], ["C", "P", "I", "N", 0.25], strict=True):
            sample["scores"] = {"grade": {"value": value}, "parts": {"value": {"a": 1, "b": True}}}

    log = find_one(files / "inspect", "*.json")
    packed = pack_log(files / "a.eval", log, set_grades)
    found = compare_files(packed)
    assert found.scores["mockllm/carries", "addition", "test"].value == pytest.approx(0.35)
    assert compare_files(packed, metrics=["parts.b"]).metrics["addition"].name == "parts.b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(status="error"), "its status is error; give logs of finished"),
        (lambda x: x["samples"][1].update(scores=None, error="out of memory"), "out of memory"),
        (
            lambda x: x["samples"][1]["scores"]["match"].update(value="?"),
            r"scores\.match: expected",
        ),
        (lambda x: x["samples"].append(x["samples"][0]), "is also in .*sample s0, epoch 1"),
        (lambda x: x.update(samples=[]), "no samples"),
        (lambda x: x.update(eval=[]), "eval: expected a JSON object, got list"),
    ],
)
def test_wrong_logs_of_inspect_are_named(change, message, files):
    log = find_one(files / "inspect", "*.json")
    packed = pack_log(files / "a.eval", log, change)
    for path in (packed, edit_json(log, change)):
        with pytest.raises(EvidenceError, match=message) as raised:
            compare_files(path)
        assert str(raised.value).startswith(str(path))


def test_damaged_archives_are_named_and_nothing_is_unpacked(files, monkeypatch):
    path = sorted((files / "inspect").glob("*.eval"))[0]
    content = path.read_bytes()
    before = sorted(files.rglob("*"))
    compare_files(path)
    assert sorted(files.rglob("*")) == before
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("summaries.json").header_offset + 60
    path.write_bytes(content[:place] + b"\xff" * 40 + content[place + 40 :])
    with pytest.raises(EvidenceError, match="a damaged archive"):
        compare_files(path)
    with zipfile.ZipFile(path) as archive:
        check_sum = archive.getinfo("header.json").CRC.to_bytes(4, "little")
    path.write_bytes(content.replace(check_sum, bytes(4)))
    with pytest.raises(EvidenceError, match=r"header\.json has a wrong check sum"):
        compare_files(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(EvidenceError, match="a damaged archive"):
        compare_files(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../header.json", "{}")
    with pytest.raises(EvidenceError, match="not a finished log of inspect"):
        compare_files(path)
    path.write_bytes(content)
    monkeypatch.setattr("skillnet_evidence.readers.inspect_logs.MAX_BYTES", 2**10)
    with pytest.raises(EvidenceError, match=r"json: more than 0 MiB"):
        compare_files(path)


# -- MTEB ----------------------------------------------------------------------------------


def test_tasks_of_mteb_are_units_that_count_once() -> None:
    found = compare_files(DATA / "mteb")
    sample = found.samples["example/large", "MTEB", "test"]
    assert sample.units == 10
    means = []
    for path in (DATA / "mteb/example__large").glob("*/*.json"):
        tree = json.loads(path.read_text())
        if "scores" in tree:
            means.append(np.mean([entry["main_score"] for entry in tree["scores"]["test"]]))
    assert found.scores["example/large", "MTEB", "test"].value == pytest.approx(np.mean(means))
    english = ["STS17/test/en-en", "BIOSSES", "SCIDOCS/test"]
    assert (
        compare_files(DATA / "mteb", tasks=english).samples["example/tiny", "MTEB", "test"].units
        == 3
    )


def test_systems_that_lack_a_task_of_mteb_are_left_out_only_by_request(files: Path) -> None:
    find_one(files, "mteb/example__tiny/*/BIOSSES.json").unlink()
    with pytest.raises(EvidenceError, match="example/tiny and other systems do not both have BIOS"):
        compare_files(files / "mteb")
    lines = read_lines([files / "mteb"], ReadOptions(tasks=["BIOSSES", "SCIDOCS"]))
    assert {row[0] for row in lines.rows} == {"example/large", "example/small"}
    assert "Left out, because they have other tasks, splits or subsets: 1." in lines.notes
    folder = files / "mteb/example__large"
    shutil.copytree(next(folder.iterdir()), folder / "fedcba9876543210")
    labels = {row[0] for row in read_lines([files / "mteb"], ReadOptions(tasks=["SCIDOCS"])).rows}
    assert {"example/large@01234567", "example/large@fedcba98"} <= labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["scores"]["test"][0].update(main_score=61.2), "61.2 is above the weight 1"),
        (lambda x: x["scores"]["test"][0].update(main_score=None), "column score: no value"),
        (
            lambda x: x["scores"]["test"][0].update(main_score="high"),
            "expected a number, got 'high'",
        ),
        (lambda x: x["scores"]["test"][0].pop("main_score"), "no main_score of the subset default"),
        (lambda x: x["scores"].update(test=[1]), r"scores\.test: expected a JSON object, got int"),
        (
            lambda x: x.update(mteb_dataset_name=x.pop("task_name"), s=x.pop("scores")),
            "before MTEB 1",
        ),
        (lambda x: x.update(mteb_dataset_name=x.pop("task_name")), "key task_name: no text"),
    ],
)
def test_wrong_results_of_mteb_are_named(change, message, files):
    path = edit_json(find_one(files, "mteb/example__tiny/*/BIOSSES.json"), change)
    with pytest.raises(EvidenceError, match=message) as raised:
        compare_files(files / "mteb")
    assert str(path) in str(raised.value)


# -- MLflow --------------------------------------------------------------------------------


@pytest.mark.integration
def test_metrics_of_mlflow_have_seeds_alone(empty_database, tmp_path):
    from mlflow import MlflowClient

    path = tmp_path / "store.db"
    shutil.copyfile(empty_database(), path)
    client = MlflowClient(f"sqlite:///{path}")
    trial = client.create_experiment("trial", artifact_location=str(tmp_path / "artifacts"))
    values = {"wide": [0.80, 0.82, 0.84], "narrow": [0.70, 0.71, 0.75]}
    for system, scores in values.items():
        for score in [*scores, None]:
            run = client.create_run(trial).info.run_id
            client.log_param(run, "system", system)
            client.log_metric(run, "loss", 2.3)
            if score is not None:
                client.log_metric(run, "val/accuracy", score - 0.1, step=1)
                client.log_metric(run, "val/accuracy", score, step=2)
            client.set_terminated(run)
    lines = read_lines([path], ReadOptions(tasks=["val/accuracy"]))
    assert "Left out: 2 runs that did not finish or lack a metric." in lines.notes
    found = compare_systems(build_runs(lines), "narrow")
    (test,) = found.tests
    # Two samples of three seeds with a pooled variance: Student's test.
    one, two = np.array(values["wide"]), np.array(values["narrow"])
    pooled = (one.var(ddof=1) + two.var(ddof=1)) / 2
    assert test.difference.value == pytest.approx(one.mean() - two.mean())
    larger = max(one.var(ddof=1), pooled) + max(two.var(ddof=1), pooled)
    assert test.difference.std_error == pytest.approx(np.sqrt(larger / 3))
    for source, options, message in (
        (path, {}, "name metrics by --tasks; the runs have: loss, val/accuracy"),
        (path, {"tasks": ["f1"]}, "no finished run has f1"),
        (path, {"tasks": ["loss"]}, "2.3 is above the weight 1"),
        (path, {"tasks": ["loss"], "system": "width"}, "--system width: no text or number; keys:"),
        (f"{path}#trail", {"tasks": ["loss"]}, "unknown experiment 'trail'; did you mean 'trial'"),
        (f"sqlite:///{tmp_path}/none.db", {"tasks": ["loss"]}, "no such store"),
    ):
        with pytest.raises(EvidenceError, match=message):
            compare_files(source, **options)
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("name", ["lm_eval", "inspect", "mteb"])
def test_values_of_another_kind_never_end_in_a_traceback(name: str, files: Path) -> None:
    options = ReadOptions(unit="task") if name == "lm_eval" else ReadOptions()
    patterns = {"lm_eval": f"{SAMPLES} bigram/results_*.json", "inspect": "*.json"}
    for pattern in patterns.get(name, "example__tiny/*/STS17.json").split():
        path = find_one(files / name, pattern)
        text = path.read_text()
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        for place in list_places(json.loads(lines[0])):
            for value in (None, 7, [[]]):
                tree = json.loads(lines[0])
                set_value(tree, place, value)
                path.write_text("\n".join([json.dumps(tree), *lines[1:]]))
                with contextlib.suppress(EvidenceError):
                    build_runs(read_lines([path], options))


#: Keys that no reader looks at.
SKIPPED = {
    "events", "events_data", "plan", "stats", "messages", "output", "config", "configs", "resps",
    "arguments",
    "packages", "scorers", "reductions", "results", "dataset", "model_usage", "store",
}  # fmt: skip


def list_places(tree: object, depth: int = 0) -> list[tuple]:
    """Keys to all values of JSON down to the fifth level, of lists to the first value."""
    items = list(tree.items()) if isinstance(tree, dict) else []
    items += list(enumerate(tree[:1])) if isinstance(tree, list) else []
    found: list[tuple] = []
    for key, value in items if depth < 5 else []:
        found += [(key,), *((key, *more) for more in list_places(value, depth + 1))]
    return [place for place in found if not SKIPPED & set(place)]


def set_value(tree: object, place: tuple, value: object) -> None:
    for key in place[:-1]:
        tree = tree[key]
    tree[place[-1]] = value


# -- all -----------------------------------------------------------------------------------


def lock_archive(bit: int, compression: int) -> bytes:
    """Return an archive whose members state a password (bit 1) or a kind of compression."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        # A fixed date, because the bytes name the case and all processes collect the same names.
        archive.writestr(zipfile.ZipInfo("header.json"), "{}")
    changed = bytearray(content.getvalue())
    listed = changed.find(b"PK\x01\x02")
    for flags, kind in ((6, 8), (listed + 8, listed + 10)):
        changed[flags], changed[kind] = bit, compression
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.jsonl", b"\xff\xfe\x00", "not JSON"),
        ("scores.jsonl", b"5\n", "the column 'system' is missing"),
        ("scores.eval", lock_archive(1, 0), "an archive with a password or an unknown compression"),
        ("scores.eval", lock_archive(0, 97), "an archive with a password or an unknown"),
    ],
)
def test_files_of_other_kinds_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvidenceError, match=message) as raised:
        compare_files(tmp_path / name)
    assert str(raised.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [str(DATA / "mteb"), "--unit", "x"],
            "--unit: MTEB's results have no rows, so the unit is",
        ),
        ([str(DATA / "mteb"), "--format", "lm-eval"], "no samples; run lm_eval with --log_samples"),
        ([str(DATA / "lm_eval"), "--format", "mteb"], "no results of MTEB"),
        (
            [str(Path(__file__).parents[1] / "skillnet_evidence")],
            "no file of a known format; state",
        ),
        ([str(DATA / "lm_eval"), "--output", "page.txt"], "expected a name with .html or .svg"),
        (
            [str(DATA / "lm_eval"), "--output", "/nowhere/x.svg"],
            "--output: /nowhere/x.svg: No such",
        ),
    ],
)
def test_wrong_calls_end_with_one_sentence(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert message in caught.err
    assert caught.err.count("\n") == 1


def test_the_page_has_the_answer_the_tiers_and_a_figure(tmp_path, capsys):
    tasks = tmp_path / "tasks.txt"
    tasks.write_text("BIOSSES\nSCIDOCS\nSICK-R\n")
    page = tmp_path / "page.html"
    options = ["compare", str(DATA / "mteb"), "--output", str(page), "--tasks", f"@{tasks}"]
    assert main(options) == 0
    text = page.read_text()
    assert "over 3 tasks" in text
    assert "<svg" in text
    assert "<summary>Tiers</summary>" in text
    assert "http://www.w3.org" in text.partition("<svg")[2]
    assert not [part for part in ("<script", "src=", "<link") if part in text]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "tasks.txt"]
    assert "over 3 tasks" in capsys.readouterr().out
