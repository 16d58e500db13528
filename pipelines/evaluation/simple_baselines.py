"""What simple methods reach on the same splits: the lines a model has to be held against.

* ``chance``: what is known without looking at the input. Classes: the commonest one of the
  training rows. Speech: the commonest symbol at each place. Retrieval: candidates in random
  order (the exact expectation, so without an interval).
* ``reference``: classes: logistic regression, on TF-IDF of character n-grams or on pictures,
  clips and recordings made small. Speech: the
  transcript of the nearest training recording. Pictures and clips: the training items whose
  captions are nearest by TF-IDF stand in for the query, and candidates are ranked by how much
  they look like them. Code: TF-IDF of character n-grams, docstring against code.

They fit on the ``train`` split only, on ``KNOWN`` of its rows, evenly spread, if it has more.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.evaluation.evaluator import (
    TaskFigures,
    check_outputs,
    choose_splits,
    classification_figures,
    fixed_column,
    locate_task_corpus,
    ragged_column,
    retrieval_figures,
    sequence_figures,
    tidy_rows,
    uses_all_captions,
)
from pipelines.shards.columns import FixedColumn, open_column
from pipelines.shards.dataset import PreparedCorpus, open_corpus
from skillnet.config import SkillNetConfig
from skillnet.metrics import ConfidenceInterval, unique_group_ids
from skillnet.skills import Task, find_task
from skillnet_platform.config import digest
from skillnet_platform.storage import read_json, run_root, write_json
from skillnet_platform.storage.location import place

#: Goes up whenever a method here changes, so that kept results are not taken for new ones.
VERSION = 1

NEIGHBOURS = 5
FEATURES = 4096
#: Training rows that a simple method learns from: nearest neighbours compare with all of them.
KNOWN = 20_000


def evaluate_simple_baselines(
    data: str | Path,
    tasks: Mapping[str, Task] | None = None,
    splits: Sequence[str] | None = None,
    *,
    corpora: Mapping[str, str] | None = None,
    seed: int = 0,
    samples: int = 1000,
    keep: bool = True,
    on_task: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the systems ``chance`` and ``reference``, in the form of ``evaluate_model``.

    Args:
        data: directory of prepared corpora.
        tasks: name -> task; none takes the default five.
        splits: names; none takes every split whose name starts with ``test``.
        corpora: task -> corpus, where it is not the built-in one.
        seed: of the bootstrap.
        samples: resamplings of each interval; 0 leaves intervals out.
        keep: read and write ``references-<digest>.json`` beside the corpora. The digest covers
            the corpora, the settings and ``VERSION``.
        on_task: called with each task's name before it is computed.

    Raises:
        UserError: a missing or damaged corpus.
    """
    specs = dict(SkillNetConfig().tasks if tasks is None else tasks)
    opened = {name: open_corpus(locate_task_corpus(data, name, corpora)) for name in specs}
    where = place(data, Path())
    # Beside corpora in a store there is no room for what can be computed again.
    beside = where if isinstance(where, Path) else run_root() / "cache" / "references"
    rows: list[dict[str, Any]] = []
    for name, corpus in opened.items():
        spec = find_task(name, specs)
        check_outputs(corpus, name, spec)
        wanted = choose_splits(corpus, splits)
        key = digest([VERSION, name, corpus.digest, spec.objective, wanted, seed, samples])
        kept = beside / f"references-{corpus.name}-{key[:12]}.json"
        if keep and kept.is_file():
            rows += read_json(kept)
            continue
        if on_task is not None:
            on_task(name)
        new: list[dict[str, Any]] = []
        for split in wanted:
            for system, figures in _both(spec, corpus, split, seed, samples).items():
                new += tidy_rows(figures, system=system, task=name, seed=seed, split=split)
        if keep:
            write_json(kept, new)
        rows += new
    return rows


def _both(
    spec: Task, corpus: PreparedCorpus, split: str, seed: int, samples: int
) -> dict[str, TaskFigures]:
    train, test = _known(corpus.splits["train"].table()), corpus.splits[split].table()
    where = f"{corpus.name}/{split}"
    if spec.objective == "classification":
        return _classes(train, test, corpus.modality, where, seed, samples)
    if spec.objective == "ctc":
        return _transcripts(train, test, where, seed, samples)
    groups = unique_group_ids(fixed_column(test, "group", where))
    captions = test.column("captions").to_pylist()
    if not uses_all_captions(corpus):
        captions = [row[:1] for row in captions]
    owners = np.repeat(np.arange(len(captions)), [len(row) for row in captions])
    asked, texts = groups[owners], [caption for row in captions for caption in row]
    if corpus.modality in ("image", "video"):
        query, candidate, back_query, back_candidate = _looks(
            train, test, texts, corpus.modality, where
        )
    else:
        query, candidate = _words(train, test, texts)
        back_query, back_candidate = query, candidate
    there = retrieval_figures(
        query, candidate, asked, groups, seed, samples, ways=("",), owners=owners
    )
    back = retrieval_figures(
        back_query, back_candidate, asked, groups, seed, samples, ways=("reverse_",)
    )
    return {"chance": random_ranks(groups, asked), "reference": there | back}


# -- classes -------------------------------------------------------------------------------


def _classes(
    train: pa.Table, test: pa.Table, modality: str, where: str, seed: int, samples: int
) -> dict[str, TaskFigures]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    known, right = fixed_column(train, "label", where), fixed_column(test, "label", where)
    if modality in ("text", "code"):
        vectors = _tfidf((1, 2), 60_000)
        features = vectors.fit_transform(_strings(train, modality))
        asked = vectors.transform(_strings(test, modality))
    elif modality == "sound":
        features, asked = (_recordings(table, where) for table in (train, test))
    else:
        name = "pixels" if modality == "image" else "frames"
        features, asked = (_coarse(_all(table, name, where)) / 255 for table in (train, test))
    model = LogisticRegression(C=3.0, max_iter=200, tol=1e-3)
    with warnings.catch_warnings():
        # On thousands of dense features it is still moving after 200 steps, and good enough.
        warnings.simplefilter("ignore", ConvergenceWarning)
        said = model.fit(features, known).predict(asked)
    commonest = np.full(len(right), np.bincount(known).argmax())
    return {
        "chance": classification_figures(commonest, right, seed, samples),
        "reference": classification_figures(said, right, seed, samples),
    }


# -- sound ---------------------------------------------------------------------------------


def _transcripts(
    train: pa.Table, test: pa.Table, where: str, seed: int, samples: int
) -> dict[str, TaskFigures]:
    known, right = ragged_column(train, "symbols", where), ragged_column(test, "symbols", where)
    nearest = _nearest(_recordings(test, where), _recordings(train, where), 1)[0][:, 0]
    places = max(len(row) for row in known)
    usual = round(float(np.mean([len(row) for row in known])))
    commonest = [
        int(np.bincount([row[place] for row in known if len(row) > place]).argmax())
        for place in range(min(usual, places))
    ]
    return {
        "chance": sequence_figures([commonest] * len(right), right, seed, samples),
        "reference": sequence_figures([known[row] for row in nearest], right, seed, samples),
    }


def _recordings(table: pa.Table, where: str, frames: int = 24) -> np.ndarray:
    """(N, frames * mels) unit vectors: recordings stretched to one length."""
    column = open_column(table, "log_mel", where)
    assert not isinstance(column, FixedColumn)
    out = []
    for row in range(len(table)):
        mel_TM = column.take(np.array([row]))[0][0].astype(np.float32)  # type: ignore[union-attr]
        place = np.linspace(0, len(mel_TM) - 1, frames)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, len(mel_TM) - 1)
        share = (place - low)[:, None].astype(np.float32)
        out.append(((1 - share) * mel_TM[low] + share * mel_TM[high]).ravel())
    return _unit(np.stack(out))


# -- pictures, clips, code -----------------------------------------------------------------


def _looks(
    train: pa.Table, test: pa.Table, texts: list[str], modality: str, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Query and candidate vectors of text -> X, then of X -> text."""
    names = train.column("captions").to_pylist()
    owner = np.repeat(np.arange(len(names)), [len(captions) for captions in names])
    vectors = _tfidf((1, 2), FEATURES)
    known_text = vectors.fit_transform([caption for captions in names for caption in captions])
    known_text = known_text.toarray().astype(np.float32)
    text = vectors.transform(texts).toarray().astype(np.float32)
    name = "pixels" if modality == "image" else "frames"
    known_look, look = (_small(_all(table, name, where)) for table in (train, test))
    rows, weights = _nearest(text, known_text, NEIGHBOURS)
    query = _mix(known_look[owner][rows], weights)
    firsts = np.unique(owner, return_index=True)[1]
    rows, weights = _nearest(look, known_look, NEIGHBOURS)
    return query, look, text, _mix(known_text[firsts][rows], weights)


def _words(train: pa.Table, test: pa.Table, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    vectors = _tfidf((1, 3), FEATURES)
    vectors.fit([*_first_captions(train), *_strings(train, "code")])
    candidate = _strings(test, "code")
    return (
        vectors.transform(texts).toarray().astype(np.float32),
        vectors.transform(candidate).toarray().astype(np.float32),
    )


def random_ranks(groups: np.ndarray, asked: np.ndarray | None = None) -> TaskFigures:
    """Expected figures if every query's candidates came in random order.

    A query with p right answers among N finds none in the first k with probability
    (N-p)/N * (N-p-1)/(N-1) * ... over k factors.

    Args:
        groups: (N,) of the candidates.
        asked: (Q,) of the queries; none is one for each candidate.
    """
    nothing = float("nan")
    asked = groups if asked is None else asked
    return {
        f"{way}{name}": ConfidenceInterval(value, nothing, nothing)
        for way, here, there in (("", asked, groups), ("reverse_", groups, asked))
        for name, value in _expected(here, there).items()
    }


def _expected(queries: np.ndarray, candidates: np.ndarray) -> dict[str, float]:
    names, sizes = np.unique(candidates, return_counts=True)
    right, often = np.unique(sizes[np.searchsorted(names, queries)], return_counts=True)
    total, share = len(candidates), often / often.sum()
    missed = np.ones(len(right))
    found_by: list[float] = []
    while len(found_by) < total and (len(found_by) < 10 or found_by[-1] < 0.5):
        k = len(found_by)
        missed *= np.maximum(total - right - k, 0) / (total - k)
        found_by.append(float(1 - missed @ share))
    values = {f"recall_at_{k}": found_by[min(k, total) - 1] for k in (1, 5, 10)}
    values["median_rank"] = float(np.searchsorted(found_by, 0.5) + 1)
    return values


def _small(x: np.ndarray) -> np.ndarray:
    """Pictures (N, H, W, C) or clips (N, F, H, W, C) -> unit vectors of coarse brightness."""
    coarse = _coarse(x)
    return _unit(coarse - coarse.mean(1, keepdims=True))


def _coarse(x: np.ndarray, side: int = 12) -> np.ndarray:
    """Pictures or clips as vectors of coarse brightness, 0 … 255, (N, E)."""
    if x.ndim == 4:
        x = x[:, None]
    N, F, H, W, C = x.shape
    step = max(H // side, 1)
    h, w = H // step, W // step
    blocks = x[:, :, : h * step, : w * step].reshape(N, F, h, step, w, step, C)
    return blocks.mean((3, 5), dtype=np.float32).reshape(N, -1)


def _nearest(x_NE: np.ndarray, known_ME: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, count) rows of the most similar known vectors, best first, and their similarity."""
    count = min(count, len(known_ME))
    rows, values = [], []
    for start in range(0, len(x_NE), 512):
        similar = x_NE[start : start + 512] @ known_ME.T
        best = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        value = np.take_along_axis(similar, best, 1)
        order = np.argsort(-value, axis=1, kind="stable")
        rows.append(np.take_along_axis(best, order, 1))
        values.append(np.take_along_axis(value, order, 1))
    return np.concatenate(rows), np.concatenate(values)


def _mix(vectors_NKE: np.ndarray, similarity_NK: np.ndarray) -> np.ndarray:
    """(N, E) mean of neighbours, the nearest ones counting far more."""
    weights = np.exp(20 * (similarity_NK - similarity_NK.max(1, keepdims=True)))
    return _unit(np.einsum("nke,nk->ne", vectors_NKE, weights / weights.sum(1, keepdims=True)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def _tfidf(ngrams: tuple[int, int], features: int) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        analyzer="char", ngram_range=ngrams, sublinear_tf=True, max_features=features
    )


def _strings(table: pa.Table, name: str) -> list[str]:
    return table.column(name).to_pylist()


def _known(train: pa.Table) -> pa.Table:
    """All rows, or ``KNOWN`` of them, evenly spread."""
    if len(train) <= KNOWN:
        return train
    return train.take(np.linspace(0, len(train) - 1, KNOWN).astype(np.int64))


def _first_captions(table: pa.Table) -> list[str]:
    return [captions[0] for captions in table.column("captions").to_pylist()]


def _all(table: pa.Table, name: str, where: str) -> np.ndarray:
    return fixed_column(table, name, where)
