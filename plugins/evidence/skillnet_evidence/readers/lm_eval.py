"""Samples of lm-evaluation-harness: the answers of a model to each document of a task.

``lm_eval run --log_samples --output_path FOLDER`` writes ``samples_TASK_DATE.jsonl`` and
``results_DATE.json`` in a folder of each model.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skillnet_evidence.errors import EvidenceError, require_known
from skillnet_evidence.readers.lines import (
    PeerLines,
    ReadOptions,
    ScoreLines,
    find_value,
    list_files,
    load_json,
    parse_json,
    require_dict,
    require_value,
)

#: Name of a file of lm-evaluation-harness with the answers of one model to one task.
SAMPLES_NAME = re.compile(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl")


def read_lm_eval(sources: Sequence[str], options: ReadOptions) -> ScoreLines:
    """Return the samples of models that lm-evaluation-harness wrote with ``--log_samples``."""
    found, known = PeerLines(), []
    descriptions: dict[tuple[Path, str], dict[str, Any]] = {}
    for path, is_named in list_files(sources, ".jsonl"):
        name = SAMPLES_NAME.fullmatch(path.name)
        if name is None:
            if is_named:
                raise EvidenceError(f"{path}: expected a name like samples_TASK_DATE.jsonl")
            continue
        task, date = name.groups()
        key = (path.parent, date)
        if key not in descriptions:
            descriptions[key] = _load_description(path.parent, date)
        group = _find_group(descriptions[key], task) if options.unit == "task" else task
        known += [task, group]
        if not options.tasks or {task, group} & set(options.tasks):
            _add_samples(found, path, task, descriptions[key], options)
    require_known(options.tasks, known, "--tasks", "task")
    if not found.rows:
        raise EvidenceError(f"{sources[0]}: no samples; run lm_eval with --log_samples")
    return found.finish()


def _load_description(folder: Path, date: str) -> dict[str, Any]:
    """Return what lm-eval wrote about a run, beside its samples; {} without such a file."""
    for path in sorted(folder.glob(f"*_{date}.json")):
        return require_dict(load_json(path), str(path))
    return {}


def _find_group(description: Mapping[str, Any], task: str) -> str:
    """Return the outermost group of a task, or the task itself."""
    groups = description.get("group_subtasks")
    parents = {
        str(child): group
        for group, children in (groups.items() if isinstance(groups, dict) else ())
        for child in (children if isinstance(children, list) else ())
    }
    for _ in parents:
        task = parents.get(task, task)
    return task


def _add_samples(
    found: PeerLines, path: Path, task: str, about: dict[str, Any], options: ReadOptions
) -> None:
    system = str(about.get("model_name") or path.parent.name)
    if options.system:
        system = require_value(about, options.system, str(path), "--system")
    samples = []
    with path.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            place = f"{path}, line {number}"
            samples.append((place, require_dict(parse_json(line, place), place)))
    if not samples:
        raise EvidenceError(f"{path}: no samples")
    metric, rule = _choose_metric(found, path, task, [each for _, each in samples], options)
    # Not one key joined by dots: the name of a task may have dots itself.
    better = find_value(find_value(about.get("higher_is_better"), task), metric)
    group = _find_group(about, task) if options.unit == "task" else task
    for place, sample in samples:
        if sample.get("filter", "none") != rule:
            continue
        score = sample.get(metric)
        if not isinstance(score, int | float):
            raise EvidenceError(
                f"{place}: {metric}: expected a number for each row, got {type(score).__name__}; "
                "name another by --metric"
            )
        # The hash tells documents apart that have one number in two versions of a task.
        row, unit = f"{sample.get('doc_id')} {str(sample.get('doc_hash', ''))[:8]}".strip(), None
        if options.unit == "task":
            row, unit = f"{task} {row}", task
        elif options.unit:
            unit = require_value(sample.get("doc"), options.unit, place, "--unit")
        values = {"system": system, "seed": 0, "task": group, "row": row, "score": float(score)}
        metric_name = metric if rule == "none" else f"{metric} {rule}"
        found.add(place, values | {"unit": unit, "metric": metric_name, "errors": better is False})


def _list_metrics(sample: Mapping[str, Any], options: ReadOptions) -> list[str]:
    """Return the metrics of a sample; early versions do not list them."""
    listed = sample.get("metrics")
    names = listed if isinstance(listed, list) else options.metrics
    return [str(name).partition(",")[0] for name in names]


def _choose_metric(
    found: PeerLines,
    path: Path,
    task: str,
    samples: Sequence[Mapping[str, Any]],
    options: ReadOptions,
) -> tuple[str, str]:
    """Return the metric of a task and the filter of its answers."""
    have = [
        f"{metric},{sample.get('filter', 'none')}"
        for sample in samples
        for metric in _list_metrics(sample, options)
        if metric in sample
    ]
    have = list(dict.fromkeys(have))
    wanted = [
        name
        for metric in options.metrics
        for name in have
        if name == metric or name.partition(",")[0] == metric
    ]
    if not have or (options.metrics and not wanted):
        listed = ", ".join(have) or "none"
        raise EvidenceError(f"{path}: name a metric of its rows by --metric; it has: {listed}")
    chosen = (wanted or have)[0]
    if others := [name for name in have if name != chosen]:
        found.note(f"scored by {chosen}; --metric takes {', '.join(others)}, too", task)
    metric, _, rule = chosen.partition(",")
    return metric, rule
