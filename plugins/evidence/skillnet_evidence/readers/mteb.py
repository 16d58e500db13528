"""Results of MTEB: ``results/MODEL/REVISION/TASK.json`` with scores of splits and subsets."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from skillnet_evidence.errors import EvidenceError, require_known
from skillnet_evidence.readers.lines import (
    PeerLines,
    ReadOptions,
    ScoreLines,
    forbid_options,
    list_files,
    load_json,
    name_format,
    require_dict,
    require_value,
)

#: The only task of MTEB results, whose rows are MTEB's tasks.
MTEB_TASK = "MTEB"


def read_mteb(sources: Sequence[str], options: ReadOptions) -> ScoreLines:
    """Return the scores of MTEB's tasks as rows of one task: its results have no rows."""
    forbid_options(options, "MTEB's results", unit="have no rows, so the unit is the task")
    forbid_options(options, "MTEB's results", system="are named by their folders")
    wanted = {task.partition("/")[0] for task in options.tasks}
    scores: dict[tuple[str, str], dict[str, tuple[str, str, Any]]] = {}
    old: list[Path] = []
    metric = options.metrics[0] if options.metrics else "main_score"
    for path, is_named in list_files(sources, ".json"):
        # Of a large collection most files are of other tasks.
        if wanted and path.stem not in wanted:
            continue
        tree = load_json(path)
        if name_format(tree) != "mteb":
            if is_named:
                raise EvidenceError(f"{path}: not a result of MTEB; it has no key task_name")
            continue
        if "scores" not in tree:
            old.append(path)
            continue
        revision = path.resolve().parent
        name = revision.parent.name.replace("__", "/")
        rows = scores.setdefault((name, revision.name), {})
        for row, task, value, place in _list_scores(tree, path, metric):
            if not wanted or any(_has_prefix(row, each) for each in options.tasks):
                if row in rows:
                    raise EvidenceError(f"{place}: also in {rows[row][1]}")
                rows[row] = (task, place, value)
    if old and not options.tasks:
        raise EvidenceError(f"{old[0]}: written before MTEB 1.11; load and save it by mteb")
    if not any(scores.values()):
        raise EvidenceError(f"{sources[0]}: no results of MTEB for these tasks")
    lines = _fill_mteb({key: rows for key, rows in scores.items() if rows}, metric, options)
    note = [f"Files from before MTEB 1.11 are not read: {len(old)}."] if old else []
    return lines._replace(notes=[*lines.notes, *note])


def _has_prefix(row: str, task: str) -> bool:
    return f"{row}/".startswith(f"{task}/")


def _list_scores(tree: Any, path: Path, metric: str) -> Iterator[tuple[str, str, Any, str]]:
    """Yield row, task, score and place of each split and subset in a file of MTEB."""
    task = require_value(tree, "task_name", str(path), "key")
    for split, entries in require_dict(tree["scores"], f"{path}, scores").items():
        for entry in entries if isinstance(entries, list) else [entries]:
            place = f"{path}, scores.{split}"
            subset = require_dict(entry, place).get("hf_subset", "default")
            if metric not in entry:
                raise EvidenceError(f"{place}: no {metric} of the subset {subset}")
            yield f"{task}/{split}/{subset}", task, entry[metric], f"{place}, {subset}"


def _fill_mteb(
    scores: Mapping[tuple[str, str], Mapping[str, tuple[str, str, Any]]],
    metric: str,
    options: ReadOptions,
) -> ScoreLines:
    """Return lines of the systems that have all rows."""
    found, left_out = PeerLines(), 0
    known = {task for rows in scores.values() for task, _, _ in rows.values()}
    require_known([each.partition("/")[0] for each in options.tasks], known, "--tasks", "task")
    names = [name for name, _ in scores]
    # The rows that most systems have: one with a further split must not exclude all others.
    counts = Counter(
        frozenset(rows)
        for rows in scores.values()
        if all(any(_has_prefix(row, task) for row in rows) for task in options.tasks)
    )
    if not counts:
        raise EvidenceError("--tasks: no system of MTEB has all of these tasks; name fewer")
    wanted = max(counts, key=lambda rows: (counts[rows], len(rows)))
    for (name, revision), rows in scores.items():
        system = name if names.count(name) == 1 else f"{name}@{revision[:8]}"
        if rows.keys() != wanted:
            if not options.tasks:
                raise EvidenceError(
                    f"{next(iter(rows.values()))[1]}: {system} and other systems do not both have "
                    f"{min(rows.keys() ^ wanted)}; name the tasks that count by --tasks, such as "
                    "TASK or TASK/split/subset"
                )
            left_out += 1
            continue
        tasks = [task for task, _, _ in rows.values()]
        for row, (task, place, value) in rows.items():
            # Each task counts once, however many subsets it has.
            weight = 1 / tasks.count(task)
            score = value * weight if isinstance(value, int | float) else value
            values = {"system": system, "seed": 0, "task": MTEB_TASK, "row": row, "unit": task}
            found.add(place, values | {"score": score, "weight": weight, "metric": metric})
    count = len({row.partition("/")[0] for row in wanted})
    notes = [
        f"MTEB's results have no rows: the unit is the task, and intervals are over {count} tasks."
    ]
    if left_out:
        notes.append(f"Left out, because they have other tasks, splits or subsets: {left_out}.")
    return found.finish(*notes)
