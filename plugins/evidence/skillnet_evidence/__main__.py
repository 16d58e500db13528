"""``skillnet-evidence compare scores.csv``: intervals, tests, claims and power from scores."""

import argparse
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from skillnet_evidence.cells import ReportTable
from skillnet_evidence.claims import (
    Claim,
    ClaimsConfig,
    Condition,
    answer_comparison,
    evaluate_claims,
    sort_systems,
)
from skillnet_evidence.comparison import SystemComparison, compare_systems
from skillnet_evidence.errors import EvidenceError, require_known
from skillnet_evidence.figures import draw_tier_figure
from skillnet_evidence.page import build_page
from skillnet_evidence.plot_kit import encode_svg
from skillnet_evidence.power import build_power_table, plan_power, simulate_claims
from skillnet_evidence.readers.formats import READERS, read_lines
from skillnet_evidence.readers.lines import ReadOptions
from skillnet_evidence.rows import build_summary_rows
from skillnet_evidence.scale import build_scale_table, collect_scale
from skillnet_evidence.scores import FILE_FORMAT, build_runs
from skillnet_evidence.tables import build_claim_table, build_tables
from skillnet_evidence.tiers import build_pairing_table, build_tier_table, find_tiers

SOURCES = """\
Reads tables of scores (CSV, Parquet), samples of lm-evaluation-harness (samples_*.jsonl), logs of
inspect (.eval, .json), results of MTEB (MODEL/REVISION/TASK.json) and metrics of MLflow's runs
(mlflow.db, http://HOST; #NAME chooses an experiment). Folders are searched.

A table has one line per system, seed, task and row. Columns:
"""

#: Characters of a file of claims, far more than any has.
MAX_CHARACTERS = 512 * 2**10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 2 after an error in the scores, the claims or the options."""
    parser = argparse.ArgumentParser(
        prog="skillnet-evidence",
        fromfile_prefix_chars="@",
        description="Compare systems from the scores of their test rows, with intervals over seeds "
        "and held-out units.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser(
        "compare",
        fromfile_prefix_chars="@",
        help="paired differences with intervals, corrected tests, claims and power",
        description=f"{SOURCES}\n{FILE_FORMAT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("scores", nargs="+", help="files or folders of one format")
    compare.add_argument("--format", choices=READERS, help="format; found by the content")
    compare.add_argument(
        "--tasks", nargs="+", default=[], help="tasks that count; @FILE has a line each"
    )
    compare.add_argument(
        "--metric", nargs="+", default=[], help="metrics of rows, the preferred first"
    )
    compare.add_argument("--unit", help="key of the rows' documents that names their unit")
    compare.add_argument("--system", help="key of the runs that names the system; the model")
    compare.add_argument("--output", type=Path, help="page (.html) or figure of the tiers (.svg)")
    compare.add_argument("--reference", help="system that the others are tested against")
    compare.add_argument("--specialist", help="system whose scores count as 1")
    compare.add_argument("--claims", type=Path, help="YAML file with claims")
    compare.add_argument(
        "--power",
        type=int,
        metavar="SEEDS",
        help="what a study of SEEDS seeds could decide",
    )
    options = parser.parse_args(argv)
    try:
        text = "\n\n".join(_describe(options))
    except EvidenceError as error:
        print(f"error: {_escape(str(error)).replace(chr(10), ' ')}", file=sys.stderr)
        return 2
    print(_escape(text))
    return 0


def _escape(text: str) -> str:
    # Names are data of others: an escape sequence could write to the clipboard or hide text.
    return "".join(
        c if c.isprintable() or c in "\n\u00a0" else c.encode("unicode_escape").decode()
        for c in text
    )


class _ClaimsLoader(yaml.SafeLoader):
    """Safe loader without aliases, by which a short text stands for a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node that is written out."""
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Build a mapping whose keys are unique."""
        made = super().construct_mapping(node, deep)
        if len(made) < len(node.value):
            raise yaml.YAMLError(f"a key occurs twice, line {node.start_mark.line + 1} or below")
        return made


def _describe(options: argparse.Namespace) -> list[str]:
    """Return the paragraphs and tables of a comparison as Markdown; write its page or figure."""
    chosen = ReadOptions(
        options.format or "",
        options.metric,
        options.unit or "",
        options.system or "",
        options.tasks,
    )
    lines = read_lines(options.scores, chosen)
    runs = build_runs(lines)
    labels = list(dict.fromkeys(run.label for run in runs))
    # The first system of the file is a reference that every project has.
    reference = options.reference or ("skillnet" if "skillnet" in labels else labels[0])
    comparison = compare_systems(runs, reference, options.specialist)
    rules = ClaimsConfig() if options.claims is None else read_claims(options.claims)
    try:
        rules.check_names(labels, comparison.tasks)
    except EvidenceError as error:
        raise EvidenceError(f"{options.claims}: {error}") from None
    comparison = comparison.sort(sort_systems(comparison))
    claims = evaluate_claims(comparison, rules)
    answer = answer_comparison(comparison, claims)
    tiers = find_tiers(comparison)
    tables = [build_claim_table(claims, comparison)] if claims else []
    tables += [build_tier_table(comparison, tiers)] if len(labels) > 1 else []
    if lines.file_format == "lm-eval":
        tables.append(build_pairing_table(comparison))
    scale = build_scale_table(collect_scale(build_summary_rows(comparison)))
    tables += build_tables(comparison, more=[scale])
    if options.power is not None:
        tables.append(_plan_power(comparison, rules, options.power))
    if options.output is not None:
        figure = _draw_tiers(comparison, tiers.tiers)
        is_page = options.output.suffix == ".html"
        _write_file(
            options.output, build_page(answer, lines.notes, tables, figure) if is_page else figure
        )
    parts = [answer, *lines.notes, *(table.to_markdown() for table in tables)]
    return [part for part in parts if part]


def _draw_tiers(comparison: SystemComparison, tiers: Sequence[Sequence[str]]) -> str:
    try:
        return encode_svg(draw_tier_figure(comparison, tiers))
    except ModuleNotFoundError:
        raise EvidenceError(
            "--output: figures need matplotlib; in a clone, pip install './plugins/evidence[plots]'"
        ) from None


def _write_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    if path.suffix not in (".html", ".svg"):
        raise EvidenceError(f"--output: expected a name with .html or .svg, got {path}")
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise EvidenceError(f"--output: {path}: {error.strerror}") from None


def _plan_power(comparison: SystemComparison, rules: ClaimsConfig, seeds: int) -> ReportTable:
    if seeds < 2:
        raise EvidenceError(f"--power: expected two seeds or more, got {seeds}")
    counts = dict.fromkeys(comparison.systems, seeds)
    planned = plan_power(comparison, rules, counts, comparison.test_to_train)
    title = f"What {seeds} {comparison.repeat_noun}s could decide"
    return build_power_table(title, planned, simulate_claims(planned, rules))


def read_claims(path: Path) -> ClaimsConfig:
    """Read claims from a YAML file: the keys of :class:`ClaimsConfig`, also below ``claims``.

    Args:
        path: the file; it may be of untrusted origin.

    Raises:
        EvidenceError: the file is missing, is not YAML, or has a wrong key or value.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(MAX_CHARACTERS + 1)
        if len(text) > MAX_CHARACTERS:
            raise EvidenceError(f"more than {MAX_CHARACTERS} characters")
        tree = yaml.load(text, _ClaimsLoader)  # noqa: S506 - a safe loader
        if isinstance(tree, dict) and set(tree) == {"claims"}:
            tree = tree["claims"]
        return _build(ClaimsConfig, tree, "claims")
    except FileNotFoundError:
        raise EvidenceError(f"{path}: no such file") from None
    except RecursionError:
        raise EvidenceError(f"{path}: nested too deeply") from None
    except (yaml.YAMLError, OSError, ValueError, OverflowError) as error:
        raise EvidenceError(f"{path}: {' '.join(str(error).split())}") from None


def _build(hint: Any, value: Any, key: str) -> Any:
    """Return a value of YAML as the type of a field of the claims."""
    if get_origin(hint) is Annotated:
        return _build(get_args(hint)[0], value, key)
    if get_origin(hint) in (UnionType, Union):
        return None if value is None else _build(get_args(hint)[0], value, key)
    if hint in (ClaimsConfig, Claim, Condition):
        if not isinstance(value, dict):
            raise EvidenceError(f"{key}: expected keys and values, got {reprlib.repr(value)}")
        hints = get_type_hints(hint, include_extras=True)
        require_known(map(str, value), hints, key, "key")
        required = {"text", "parts", "system", "against"} & set(hints)
        if absent := sorted(required - set(value)):
            raise EvidenceError(f"{key}: the key {absent[0]!r} is missing")
        return hint(**{k: _build(hints[k], v, f"{key}.{k}") for k, v in value.items()})
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is dict and isinstance(value, dict):
        return {str(k): _build(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if kind is list and isinstance(value, list):
        return [_build(args[0], each, key) for each in value]
    if kind is float and type(value) in (int, float):
        return float(value)
    if (kind is str and isinstance(value, str)) or (kind is Literal and value in args):
        return value
    names = {dict: "keys and values", list: "a list", float: "a number", str: "text"}
    expected = names.get(kind) or f"one of {', '.join(args)}"
    raise EvidenceError(f"{key}: expected {expected}, got {reprlib.repr(value)}")


if __name__ == "__main__":
    raise SystemExit(main())
