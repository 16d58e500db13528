"""Label fractions: a task trains on a part of its rows, chosen by held-out unit when it is read.

The data loader calls :func:`select_label_fraction`. A seed and the names of the units put them in
an order, and the first of them that hold the fraction of the rows are read. A fraction of a seed is
therefore a part of every larger one. Other tasks on the corpus, such as its masked task, read all
rows, as do evaluations.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from pipelines.data.config.folds import draw_unit
from pipelines.data.shards.dataset import CorpusSplit, PreparedCorpus
from pipelines.data.shards.selected_rows import list_row_units, select_rows


def select_label_fraction(
    corpus: PreparedCorpus, splits: Sequence[str], fraction: float, seed: int = 0
) -> PreparedCorpus:
    """Return a corpus whose splits have a fraction of their rows, at least one unit in all.

    The columns of keys and units of the splits are read, also those in an object store.

    Args:
        corpus: opened, with the splits of its fold.
        splits: names of the splits that the task trains on.
        fraction: share of their rows, in (0, 1]; 1 returns the corpus as it is.
        seed: start of the random numbers of the choice.

    Raises:
        UserError: the rows have no units.
    """
    if fraction == 1:
        return corpus
    tables = {
        name: [
            (shard, corpus.splits[name].open_shard(shard).table)
            for shard in corpus.splits[name].shards
        ]
        for name in splits
    }
    units = {
        name: [list_row_units(table, corpus.name) for _, table in own]
        for name, own in tables.items()
    }
    counts = Counter(unit for own in units.values() for each in own for unit in each)
    chosen = _choose_units(counts, ceil(fraction * counts.total()), corpus.name, seed)
    selected: dict[str, CorpusSplit] = dict(corpus.splits)
    for name, own in tables.items():
        rows = [
            (shard, table, [row for row, unit in enumerate(each) if unit in chosen])
            for (shard, table), each in zip(own, units[name], strict=True)
        ]
        kept = [entry for entry in rows if entry[2]]
        del selected[name]
        if kept:
            selected[name] = select_rows(name, corpus.splits[name], kept)
    return replace(corpus, splits=selected)


def _choose_units(counts: Counter[str], rows: int, corpus: str, seed: int) -> set[str]:
    """Return the first units, in the order of the seed, that have a number of rows together."""
    purpose = f"labels of seed {seed}"
    order = sorted(counts, key=lambda unit: (draw_unit(purpose, corpus, unit), unit))
    chosen: set[str] = set()
    for unit in order:
        if rows <= 0:
            break
        chosen.add(unit)
        rows -= counts[unit]
    return chosen
