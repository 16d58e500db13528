"""Scores of any project: the file, its errors, and the command line."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from skillnet_evidence.__main__ import main
from skillnet_evidence.comparison import compare_systems
from skillnet_evidence.errors import EvidenceError
from skillnet_evidence.scores import read_scores

HEADER = ("system", "seed", "task", "row", "unit", "score")


def write_scores(path: Path, rows: list[tuple], header: tuple[str, ...] = HEADER) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def draw_rows(skills: dict[str, float], seeds: int = 4, rows: int = 60) -> list[tuple]:
    """Answers of systems to the rows of two tasks, three rows a unit."""
    found = []
    for place, task in enumerate(("reading", "listening")):
        hard = np.random.default_rng(place).random(rows)
        for name, skill in skills.items():
            for seed in range(seeds):
                noise = np.random.default_rng([place, seed, *name.encode()]).normal(0, 0.05, rows)
                right = (hard + noise < skill).astype(int)
                found += [(name, seed, task, f"r{n}", f"u{n // 3}", right[n]) for n in range(rows)]
    return found


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return write_scores(tmp_path / "scores.csv", draw_rows({"new": 0.8, "old": 0.5, "same": 0.5}))


CLAIMS = """
claims:
  margin: 0.1
  stated:
    better: {text: The new one is better., parts: [{system: new, against: old, tasks: [mean]}]}
    level: {text: Nothing is lost., parts: [{system: same, against: old, test: not_lower}]}
  order: [better]
"""


def test_a_comparison_is_printed_with_tests_claims_and_power(scores, tmp_path, capsys):
    claims = tmp_path / "claims.yaml"
    claims.write_text(CLAIMS)
    options = ["--reference", "old", "--claims", str(claims), "--power", "10"]
    assert main(["compare", str(scores), *options]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Shown: The new one is better; +")
    titles = [line[5:] for line in shown.splitlines() if line.startswith("#### ")]
    assert titles == [
        *(
            "Claims",
            "Tiers",
            "Results on held-out rows",
            "Differences from the reference",
            "All tests",
        ),
        "What 10 seeds could decide",
    ]
    assert "| new − old | +" in shown
    assert "speech" not in shown
    assert main(["compare", str(scores)]) == 0
    assert "significantly better or worse than new" in capsys.readouterr().out


def test_lines_in_any_order_and_form_give_equal_results(scores: Path, tmp_path: Path) -> None:
    wanted = compare_systems(read_scores(scores), "old")
    lines = scores.read_text().splitlines()
    shuffled = [lines[0], *np.random.default_rng(0).permutation(lines[1:])]
    (tmp_path / "shuffled.csv").write_text("\ufeff" + "\n".join(shuffled), encoding="utf-8")
    pq.write_table(pa.csv.read_csv(scores), tmp_path / "scores.parquet")
    for name in ("shuffled.csv", "scores.parquet"):
        found = compare_systems(read_scores(tmp_path / name), "old")
        for key, score in wanted.scores.items():
            assert found.scores[key] == pytest.approx(score)
    assert wanted.samples["new", "reading", "test"].units == 20
    # Other notations of the same numbers.
    words = [(*row[:5], bool(row[5])) for row in draw_rows({"new": 0.8, "old": 0.5, "same": 0.5})]
    found = compare_systems(read_scores(write_scores(tmp_path / "words.csv", words)), "old")
    assert found.scores == wanted.scores
    # Without the column, each row is a unit.
    single = [row[:4] + row[5:] for row in draw_rows({"new": 0.8, "old": 0.5})]
    plain = write_scores(tmp_path / "plain.csv", single, (*HEADER[:4], "score"))
    alone = compare_systems(read_scores(plain), "old")
    assert alone.samples["new", "reading", "test"].units == 60


def test_errors_weights_costs_and_folds_are_read(tmp_path: Path) -> None:
    header = (*HEADER, "weight", "metric", "errors", "flops", "fold")
    rows = [
        (system, seed, "speech", f"{fold}-{n}", "", edits, 4, "word_errors", "true", flops, fold)
        for system, edits, flops in (("new", 1, 50), ("old", 2, 100))
        for seed in (0, 1)
        for fold in range(3)
        for n in range(5)
    ]
    found = compare_systems(read_scores(write_scores(tmp_path / "x.csv", rows, header)), "old")
    assert found.scores["new", "speech", "test"].value == pytest.approx(0.75)
    assert found.metrics["speech"].label == "1 − word errors"
    assert found.costs["new", "mean"].flops == 50
    assert (found.repeat_noun, found.seeds, found.test_to_train) == ("replicate", 6, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [("new", 0, "reading", "r0", "u0")], "line 2: 5 values for 6 columns"),
        (lambda rows: [("new", "a", *rows[0][2:])], "line 2, column seed: expected a whole number"),
        (lambda rows: [(*rows[0][:5], "good")], "line 2, column score: expected a number"),
        (
            lambda rows: [*rows, (*rows[0][:5], "nan")],
            r"column score: expected a number, got 'nan'",
        ),
        (lambda rows: [(*rows[0][:5], 34)], "line 2, column score: 34 is above the weight 1"),
        (
            lambda rows: [(*rows[0][:5], -34)],
            "line 2, column score: -34 is below minus the weight 1",
        ),
        (lambda rows: [("", *rows[0][1:])], "line 2, column system: no value"),
        (lambda rows: [("new", 2**32, *rows[0][2:])], "column seed: expected a whole number"),
        (lambda rows: [("new", 0, "mean", *rows[0][3:])], "column task: 'mean' is the mean"),
        (lambda rows: [*rows, rows[3]], r"column row: 'r3' is also in .*csv, line 5"),
        (lambda rows: rows[1:], "have different rows of reading test, such as row r0, unit u0"),
        (
            lambda rows: [(*rows[0][:4], "other", rows[0][5]), *rows[1:]],
            "have different rows of reading test, such as row r0, unit",
        ),
        (lambda rows: [], "no rows below the header"),
    ],
)
def test_a_wrong_line_is_named(change, message: str, tmp_path: Path) -> None:
    rows = draw_rows({"new": 0.8, "old": 0.5})
    path = write_scores(tmp_path / "scores.csv", change(rows))
    with pytest.raises(EvidenceError, match=message) as raised:
        read_scores(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the column 'system' is missing"),
        (b"system,seed,task,row\n", "the column 'score' is missing"),
        (b"system,seed,task,row,score,units\n", "unknown column 'units'; did you mean 'unit'"),
        (b"system,seed,task,row,score,row\n", "two columns are named 'row'"),
        (b"\xff\xfe\x00", "not a file of scores"),
        (b'system,"seed\n', "not a file of scores"),
    ],
)
@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet"])
def test_a_file_of_another_kind_is_named(text, message, name, tmp_path):
    (tmp_path / name).write_bytes(text)
    wanted = message if name.endswith("csv") else "not a file of scores"
    with pytest.raises(EvidenceError, match=wanted):
        read_scores(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "while parsing"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("margn: 1", "claims: unknown key 'margn'; did you mean 'margin'"),
        ("margin: 2", r"claims\.margin: expected a number from 0 to 1, got 2"),
        ("margin: wide", r"claims\.margin: expected a number, got 'wide'"),
        ("[1]", r"claims: expected keys and values, got \[1\]"),
        ("stated: {x: {text: t}}", r"claims\.stated\.x: the key 'parts' is missing"),
        ("stated: {x: {text: t, parts: []}}", "'t' has no parts"),
        ("stated: {x: {text: t, parts: [{system: a, against: b, test: best}]}}", "one of higher"),
        ("stated: {x: {text: t, parts: [{system: a, against: a}]}}", "compared with itself"),
        ("order: [x]", "claims.order: unknown claim 'x'"),
        ("order: [a]\norder: [b]", "a key occurs twice"),
        ("a: &a [1]\nb: *a", r"aliases \(\*name\) are not supported"),
        (f"margin: 1{'0' * 400}", "too large"),
        pytest.param("[" * 1500, "nested too deeply", id="deep"),
        ("stated: {x: {text: t, parts: [{system: a, against: old}]}}", "unknown system 'a'"),
    ],
)
def test_a_wrong_claim_ends_with_one_sentence(text, message, scores, tmp_path, capsys):
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    assert main(["compare", str(scores), "--claims", str(path)]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith(f"error: {path}: ")
    assert caught.err.count("\n") == 1
    assert re.search(message, caught.err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "odl"], "--reference: unknown system 'odl'; did you mean 'old'"),
        (["--claims", "/nowhere.yaml"], "/nowhere.yaml: no such file"),
        (["--power", "1"], "--power: expected two seeds or more, got 1"),
    ],
)
def test_a_wrong_option_ends_with_one_sentence(options, message, scores, capsys):
    assert main(["compare", str(scores), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_needs_numbers_alone(scores: Path) -> None:
    code = (
        "import sys; from skillnet_evidence.__main__ import main\n"
        f"assert main(['compare', {str(scores)!r}]) == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pandas', 'pyarrow', 'matplotlib', 'rich'}\n"
        "own = {n.partition('.')[0] for n in sys.modules}\n"
        "assert not own & (heavy | {'skillnet', 'skillnet_platform', 'pipelines'}), own\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_folds_and_weights_must_fit_all_rows(tmp_path: Path) -> None:
    rows = [("new", seed, "a", f"r{n}", "", 0, n % 2, seed) for seed in range(2) for n in range(4)]
    header = (*HEADER, "weight", "fold")
    unweighted = [(*row[:6], 0, row[7]) for row in rows]
    with pytest.raises(EvidenceError, match="new, seed 0: the weights of a test sum to 0"):
        read_scores(write_scores(tmp_path / "x.csv", unweighted, header))
    mixed = [*rows[:3], (*rows[3][:7], ""), *rows[4:]]
    with pytest.raises(EvidenceError, match="line 5, column fold: no value, but other rows"):
        read_scores(write_scores(tmp_path / "x.csv", mixed, header))


def test_names_of_others_do_not_reach_the_terminal(tmp_path, capsys):
    name = "a\x1b]52;c;eA==\x07|b"
    path = write_scores(tmp_path / "x.csv", draw_rows({name: 0.8, "old": 0.5}))
    assert main(["compare", str(path)]) == 0
    assert main(["compare", str(path), "--reference", f"{name}\nx"]) == 2
    caught = capsys.readouterr()
    assert "\x1b" not in caught.out + caught.err
    assert r"a\x1b]52;c;eA==\x07\|b" in caught.out
    assert caught.err.count("\n") == 1
