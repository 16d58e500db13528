"""The formats of scores: tables, and the results that other evaluation tools write.

:func:`read_lines` finds the format by the content and returns lines with the columns of a table of
scores, which :func:`skillnet_evidence.scores.build_runs` turns into runs. No reader imports the
tool whose files it reads; only MLflow's stores are read by its own client.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from skillnet_evidence.errors import EvidenceError, require_known
from skillnet_evidence.readers.inspect_logs import read_inspect
from skillnet_evidence.readers.lines import (
    MAX_BYTES,
    ReadOptions,
    ScoreLines,
    load_json,
    name_format,
    parse_json,
    walk_files,
)
from skillnet_evidence.readers.lm_eval import read_lm_eval
from skillnet_evidence.readers.mlflow_runs import read_mlflow
from skillnet_evidence.readers.mteb import read_mteb
from skillnet_evidence.readers.tables import read_tables

#: Name of a format -> its reader.
READERS: Mapping[str, Callable[[Sequence[str], ReadOptions], ScoreLines]] = {
    "csv": read_tables,
    "parquet": read_tables,
    "lm-eval": read_lm_eval,
    "inspect": read_inspect,
    "mteb": read_mteb,
    "mlflow": read_mlflow,
}


def read_lines(sources: Sequence[str | Path], options: ReadOptions | None = None) -> ScoreLines:
    """Read files or folders of one format; return their lines.

    Args:
        sources: paths, or addresses of an MLflow store.
        options: what to read; None reads all, in the format of the first source.

    Raises:
        EvidenceError: a source is missing or damaged, has another format, or lacks what the options
            name.
    """
    chosen = options or ReadOptions()
    texts = [str(source) for source in sources]
    source = texts[0] if len(texts) == 1 else f"{texts[0]} and {len(texts) - 1} more"
    try:
        name = chosen.file_format or _detect_format(texts[0])
        require_known([name], READERS, "--format", "format")
        found = READERS[name](texts, replace(chosen, file_format=name))
        return found._replace(source=source, file_format=name)
    except FileNotFoundError as error:
        raise EvidenceError(f"{error.filename}: no such file") from None
    except OSError as error:
        raise EvidenceError(f"{error.filename or source}: {error.strerror or error}") from None


def _detect_format(source: str) -> str:
    """Return the name of the reader of a source, by its content."""
    if "://" in source:
        return "mlflow"
    path = Path(source)
    if not path.exists():
        # An experiment follows the name of an MLflow store.
        path = Path(source.partition("#")[0])
    if not path.is_dir():
        return _sniff_file(path, "csv") if path.exists() else "csv"
    for file in walk_files(path):
        if found := _sniff_file(file, ""):
            return found
    known = ", ".join(READERS)
    raise EvidenceError(f"{source}: no file of a known format; state one by --format ({known})")


def _sniff_file(path: Path, other: str) -> str:
    with path.open("rb") as stream:
        head = stream.read(16)
    if path.suffix in (".csv", ".parquet"):
        return path.suffix[1:]
    for start, name in ((b"PAR1", "parquet"), (b"PK\x03\x04", "inspect"), (b"SQLite", "mlflow")):
        if head.startswith(start):
            return name
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as stream:
            tree = parse_json(stream.readline(MAX_BYTES), str(path))
        return "lm-eval" if isinstance(tree, dict) and "doc_id" in tree else other
    if path.suffix == ".json" or head.lstrip()[:1] == b"{":
        return name_format(load_json(path)) or other
    return other
