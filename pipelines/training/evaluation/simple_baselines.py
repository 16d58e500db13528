"""Simple baselines on the splits of a model: the systems ``chance`` and ``simple_baseline``.

``chance`` predicts without reading the input:

* Classification: the most frequent class of the training rows.
* Labels and numbers: the shares of the training labels, the mean of the training values.
* Speech: the most frequent symbol at each position.
* Retrieval: candidates in random order; its exact expectation, so it has no interval.

``simple_baseline`` is a method without a neural network:

* Classification: logistic regression on TF-IDF of character n-grams, or on downsampled images,
  video and audio. Labels: one such model per label. Numbers: ridge regression.
* Speech: the transcript of the nearest training recording.
* Image and video retrieval: the training items whose captions are nearest by TF-IDF replace the
  query; candidates are ranked by visual similarity to them.
* Code retrieval: TF-IDF of character n-grams, docstring against code.

An objective names the function that measures both; a package brings one of its own, which gets
:class:`BaselineRows`. The methods fit on at most ``MAX_TRAIN_ROWS`` evenly spaced rows of the
``train`` split. The main entry point is :func:`evaluate_simple_baselines`; ``skillnet evaluate``
and ``skillnet quickstart`` call it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.config.folds import FoldConfig
from pipelines.data.shards.columns import FixedColumn, open_column
from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.training.evaluation.evaluator import (
    choose_splits,
    describe_rows,
    open_task_corpus,
    read_fixed_column,
    read_targets,
    read_unit_numbers,
    tidy_rows,
    uses_all_captions,
)
from pipelines.training.runs.vocabulary_match import check_outputs
from skillnet.config import SkillNetConfig
from skillnet.metrics import ConfidenceInterval, MetricIntervals, TaskMetrics
from skillnet.modality import find_modality
from skillnet.objectives.base import find_objective
from skillnet.objectives.ctc import RowTranscripts
from skillnet.objectives.heads import head_class
from skillnet.objectives.retrieval import rank_metrics, retrieval_ranks, unique_group_ids
from skillnet.skills import Task, find_task
from skillnet_platform.config import digest_config
from skillnet_platform.storage import read_json, run_root, write_json
from skillnet_platform.storage.location import parse_location

#: Increase it when a method in this file changes, so that cached results are not reused.
BASELINES_VERSION = 3

NEIGHBOURS = 5
#: Strength of the penalty of ridge regression, on values of unit variance.
RIDGE_PENALTY = 1.0
#: Maximum size of a TF-IDF vocabulary in retrieval.
FEATURES = 4096
#: Maximum number of training rows: the nearest-neighbour methods compare with all of them.
MAX_TRAIN_ROWS = 20_000


def evaluate_simple_baselines(
    data: str | Path,
    tasks: Mapping[str, Task] | None = None,
    splits: Sequence[str] | None = None,
    *,
    corpora: Mapping[str, str] | None = None,
    seed: int = 0,
    bootstrap_samples: int = 1000,
    use_cache: bool = True,
    on_task: Callable[[str], None] | None = None,
    fold: FoldConfig | None = None,
) -> list[dict[str, Any]]:
    """Evaluate ``chance`` and ``simple_baseline`` on the splits of some tasks.

    Args:
        data: directory of prepared corpora.
        tasks: name -> task; None selects the default five.
        splits: names; None selects every split whose name starts with ``test``.
        corpora: task -> corpus; other tasks use the built-in corpus.
        seed: start of the bootstrap's random numbers.
        bootstrap_samples: resamples of each interval; 0 omits intervals.
        use_cache: read and write ``simple-baselines-<corpus>-<digest>.json`` beside the corpora.
            The digest covers the corpora, the settings and ``BASELINES_VERSION``.
        on_task: called with the name of each task that is computed.
        fold: whose splits are fitted and measured; None takes the splits of the corpora.

    Returns:
        Rows in the format of :func:`pipelines.training.evaluation.evaluator.evaluate_model`.

    Raises:
        UserError: a corpus is missing or damaged.
    """
    specs = dict(SkillNetConfig().tasks if tasks is None else tasks)
    opened = {name: open_task_corpus(data, name, corpora, fold) for name in specs}
    where = parse_location(data, Path())
    # Results can be recomputed, so they are not written to an object store.
    # Beside the corpora, all runs on this data share the results.
    cache = where if isinstance(where, Path) else run_root() / "cache" / "simple-baselines"
    rows: list[dict[str, Any]] = []
    for name, corpus in opened.items():
        spec = find_task(name, specs)
        check_outputs(corpus, name, spec)
        names = choose_splits(corpus, splits)
        settings: list[Any] = [spec.objective, names, seed, bootstrap_samples]
        if fold is not None and fold.count:
            settings.append(asdict(fold))
        key = digest_config([BASELINES_VERSION, name, corpus.digest, *settings])
        path = cache / f"simple-baselines-{corpus.name}-{key[:12]}.json"
        if use_cache and path.is_file():
            rows += read_json(path)
            continue
        if on_task is not None:
            on_task(name)
        new: list[dict[str, Any]] = []
        train = BaselineTraining(spec, corpus)
        for split in names:
            systems = _measure_both(train, split, seed, bootstrap_samples)
            for system, metrics in systems.items():
                where_measured = describe_rows(corpus, fold)
                new += tidy_rows(
                    metrics, system=system, task=name, seed=seed, **where_measured, split=split
                )
        if use_cache:
            write_json(path, new)
        rows += new
    return rows


@dataclass(frozen=True)
class BaselineTraining:
    """Training rows of a task, and parts of the methods that are fitted once for all splits.

    Args:
        task: objective and towers of the rows.
        corpus: opened corpus of the task.
    """

    task: Task
    corpus: PreparedCorpus

    @property
    def where(self) -> str:
        """Corpus and split, for messages."""
        return f"{self.corpus.name}/train"

    @cached_property
    def table(self) -> pa.Table:
        """All training rows, or ``MAX_TRAIN_ROWS`` evenly spaced ones."""
        train = self.corpus.splits["train"].table()
        if len(train) <= MAX_TRAIN_ROWS:
            return train
        # A corpus may be sorted by class or source; evenly spaced rows cover all of it.
        return train.take(np.linspace(0, len(train) - 1, MAX_TRAIN_ROWS).astype(np.int64))

    @cached_property
    def targets(self) -> dict[str, np.ndarray]:
        """Targets of the rows, by name."""
        return read_targets(self.table, self.task, self.where)

    @cached_property
    def content_ngrams(self) -> tuple[Any, Any]:
        """Vectorizer of the texts, and their sparse vectors."""
        vectors = _tfidf((1, 2), 60_000)
        return vectors, vectors.fit_transform(_contents(self.table, self.corpus.modality))

    @cached_property
    def pair_ngrams(self) -> Any:
        """Vectorizer of captions and texts."""
        captions = [row[0] for row in self.table.column("captions").to_pylist()]
        # One vocabulary for both sides; otherwise their vectors could not be compared.
        texts = [*captions, *_contents(self.table, self.corpus.modality)]
        return _tfidf((1, 3), FEATURES).fit(texts)

    @cached_property
    def caption_ngrams(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """Vectorizer of captions, their vectors, (captions, E), and the row of each."""
        captions = self.table.column("captions").to_pylist()
        owner = np.repeat(np.arange(len(captions)), [len(row) for row in captions])
        vectors = _tfidf((1, 2), FEATURES)
        text = vectors.fit_transform([caption for row in captions for caption in row])
        return vectors, _dense(text), owner

    @cached_property
    def brightness(self) -> np.ndarray:
        """Downsampled images or video, (N, E) in 0 … 255."""
        name = find_modality(self.corpus.modality).column
        return _brightness(read_fixed_column(self.table, name, self.where))

    @cached_property
    def audio(self) -> np.ndarray:
        """Unit vectors of the recordings, (N, E)."""
        return _audio_vectors(self.table, find_modality(self.corpus.modality).column, self.where)


@dataclass(frozen=True)
class BaselineRows:
    """Rows that the simple baselines of an objective fit and measure.

    Args:
        task: objective and towers of the rows.
        corpus: opened corpus of the task.
        train: rows to fit.
        test: rows of the measured split.
        where: corpus and split, for messages.
        intervals: bootstrap of the measured rows.
    """

    task: Task
    corpus: PreparedCorpus
    train: BaselineTraining
    test: pa.Table
    where: str
    intervals: MetricIntervals

    @cached_property
    def targets(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Targets of the training rows and of the split's rows, by name."""
        return self.train.targets, read_targets(self.test, self.task, self.where)

    @cached_property
    def features(self) -> tuple[Any, Any]:
        """Features of training and test rows: n-grams of texts, or downsampled media."""
        modality = find_modality(self.corpus.modality)
        if modality.reads_tokens:
            vectors, train_features = self.train.content_ngrams
            return train_features, vectors.transform(_contents(self.test, self.corpus.modality))
        name, train = modality.column, self.train
        if isinstance(open_column(self.test, name, self.where), FixedColumn):
            rows = read_fixed_column(self.test, name, self.where)
            return train.brightness / 255, _brightness(rows) / 255
        return train.audio, _audio_vectors(self.test, name, self.where)

    def measure(self, predictions: Any) -> TaskMetrics:
        """Return the metrics of predictions for the split's rows.

        Args:
            predictions: as the head's ``infer`` returns them.
        """
        head, targets = head_class(self.task), self.targets[1]
        return head.evaluate(self.task, predictions, targets, self.intervals).metrics


def _measure_both(
    train: BaselineTraining, split: str, seed: int, bootstrap_samples: int
) -> dict[str, TaskMetrics]:
    """Return system -> metrics of one task on one split; none if no simple method is known."""
    measure = find_objective(train.task.objective).load_baseline()
    if measure is None:
        return {}
    corpus = train.corpus
    test, where = corpus.splits[split].table(), f"{corpus.name}/{split}"
    intervals = MetricIntervals(seed, bootstrap_samples, read_unit_numbers(test, where))
    return measure(BaselineRows(train.task, corpus, train, test, where, intervals))


# -- retrieval -----------------------------------------------------------------------------


def measure_search_baselines(rows: BaselineRows) -> dict[str, TaskMetrics]:
    """Return the metrics of searches by text, and of searches for text.

    No simple method is known for pairs of rows.

    Args:
        rows: prepared rows of a task.
    """
    spec, modality = rows.task, find_modality(rows.corpus.modality)
    if spec.caption_tower is None:
        return {}
    groups = unique_group_ids(rows.targets[1]["groups"])
    captions = rows.test.column("captions").to_pylist()
    if not uses_all_captions(rows.corpus) or spec.caption_tower == "candidate":
        captions = [row[:1] for row in captions]
    owners = np.repeat(np.arange(len(captions)), [len(row) for row in captions])
    query_groups, texts = groups[owners], [caption for row in captions for caption in row]
    chance = random_ranking_metrics(groups, query_groups)
    if modality.reads_tokens:
        vectors, contents = rows.train.pair_ngrams, _contents(rows.test, rows.corpus.modality)
        query, candidate = (_dense(vectors.transform(each)) for each in (texts, contents))
        back_query, back_candidate = query, candidate
    elif isinstance(open_column(rows.test, modality.column, rows.where), FixedColumn):
        media = read_fixed_column(rows.test, modality.column, rows.where)
        query, candidate, back_query, back_candidate = _visual_vectors(rows.train, media, texts)
    else:
        return {"chance": chance}
    ranks = retrieval_ranks(query, candidate, query_groups, groups)
    back = retrieval_ranks(back_candidate, back_query, groups, query_groups)
    metrics = rank_metrics(ranks, "", rows.intervals, owners)
    metrics |= rank_metrics(back, "reverse_", rows.intervals)
    found = {"chance": chance, "simple_baseline": metrics}
    is_swapped = spec.caption_tower == "candidate"
    return {name: _swap_directions(each) for name, each in found.items()} if is_swapped else found


def _swap_directions(metrics: TaskMetrics) -> TaskMetrics:
    """Return the metrics of text -> X as those of X -> text."""
    return {
        name.removeprefix("reverse_") if name.startswith("reverse_") else f"reverse_{name}": value
        for name, value in metrics.items()
    }


# -- classification ------------------------------------------------------------------------


def measure_class_baselines(rows: BaselineRows) -> dict[str, TaskMetrics]:
    """Return the metrics of the most frequent class, and of logistic regression.

    Args:
        rows: prepared rows of a task.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    train_labels = rows.targets[0]["labels"]
    train_features, features = rows.features
    model = LogisticRegression(C=3.0, max_iter=200, tol=1e-3)
    with warnings.catch_warnings():
        # On thousands of dense features, 200 steps are accurate enough without convergence.
        warnings.simplefilter("ignore", ConvergenceWarning)
        predicted = model.fit(train_features, train_labels).predict(features)
    most_frequent = np.full(len(predicted), np.bincount(train_labels).argmax())
    classes = np.eye(rows.task.outputs, dtype=np.float32)
    return {
        "chance": rows.measure(classes[most_frequent]),
        "simple_baseline": rows.measure(classes[predicted]),
    }


# -- labels and numbers --------------------------------------------------------------------


def measure_label_baselines(rows: BaselineRows) -> dict[str, TaskMetrics]:
    """Return the metrics of the shares of the labels, and of logistic regression per label.

    Args:
        rows: prepared rows of a task.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    truth_NC = rows.targets[0]["label_sets"] > 0
    shares_C = truth_NC.mean(0)
    train_features, features = rows.features
    model = OneVsRestClassifier(LogisticRegression(C=3.0, max_iter=200, tol=1e-3))
    with warnings.catch_warnings():
        # A label of every training row, or of none, is predicted as such.
        warnings.simplefilter("ignore")
        found = model.fit(train_features, truth_NC.astype(int)).predict_proba(features)
    return {
        "chance": rows.measure(np.tile(shares_C, (len(rows.test), 1))),
        "simple_baseline": rows.measure(found),
    }


def measure_number_baselines(rows: BaselineRows) -> dict[str, TaskMetrics]:
    """Return the metrics of the mean of the training values, and of ridge regression.

    Args:
        rows: prepared rows of a task.
    """
    from sklearn.linear_model import Ridge

    right_N = rows.targets[0]["numbers"].astype(np.float64)
    mean, deviation = right_N.mean(), right_N.std() or 1.0
    train_features, features = rows.features
    model = Ridge(RIDGE_PENALTY).fit(train_features, (right_N - mean) / deviation)
    found_N1 = mean + deviation * np.asarray(model.predict(features)).reshape(-1, 1)
    return {
        "chance": rows.measure(np.full((len(rows.test), 1), mean)),
        "simple_baseline": rows.measure(found_N1),
    }


# -- speech --------------------------------------------------------------------------------


def measure_transcript_baselines(rows: BaselineRows) -> dict[str, TaskMetrics]:
    """Return the metrics of the most frequent symbols, and of the nearest recording.

    Args:
        rows: prepared rows of a task.
    """
    train = rows.targets[0]
    pairs = zip(train["symbols"], train["symbols_lengths"], strict=True)
    train_symbols = [row[:length].tolist() for row, length in pairs]
    name = find_modality(rows.corpus.modality).column
    vectors = _audio_vectors(rows.test, name, rows.where)
    nearest = _nearest(vectors, rows.train.audio, 1)[0][:, 0]
    longest = max(len(row) for row in train_symbols)
    # A guess of mean length balances insertions and deletions.
    mean_length = round(float(np.mean([len(row) for row in train_symbols])))
    most_frequent = [
        int(np.bincount([row[position] for row in train_symbols if len(row) > position]).argmax())
        for position in range(min(mean_length, longest))
    ]
    confidence = np.ones(len(nearest))
    return {
        "chance": rows.measure(RowTranscripts([most_frequent] * len(nearest), confidence)),
        "simple_baseline": rows.measure(
            RowTranscripts([train_symbols[row] for row in nearest], confidence)
        ),
    }


def _audio_vectors(table: pa.Table, name: str, where: str, frames: int = 24) -> np.ndarray:
    """Return (N, frames * mels) unit vectors: spectrograms resampled to one length."""
    column = open_column(table, name, where)
    assert not isinstance(column, FixedColumn)
    out = []
    for row in range(len(table)):
        # Row by row, because recordings differ in length and padding all of them costs memory.
        mel_TM = column.take(np.array([row]))[0][0].astype(np.float32)  # type: ignore[union-attr]
        # With one length, recordings of any speed and duration can be compared by their cosine.
        position = np.linspace(0, len(mel_TM) - 1, frames)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, len(mel_TM) - 1)
        fraction = (position - low)[:, None].astype(np.float32)
        out.append(((1 - fraction) * mel_TM[low] + fraction * mel_TM[high]).ravel())
    return _normalize(np.stack(out))


# -- retrieval -----------------------------------------------------------------------------


def _visual_vectors(
    train: BaselineTraining, media: np.ndarray, texts: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return query and candidate vectors of text -> X, then of X -> text."""
    vectors, train_text, owner = train.caption_ngrams
    text = _dense(vectors.transform(texts))
    train_visual, visual = (_centered(each) for each in (train.brightness, _brightness(media)))
    # Texts and pixels share no features; the captions of training items connect them.
    rows, similarity = _nearest(text, train_text, NEIGHBOURS)
    query = _neighbour_mean(train_visual[owner][rows], similarity)
    # Neighbours are items here, so each needs one text: its first caption.
    firsts = np.unique(owner, return_index=True)[1]
    rows, similarity = _nearest(visual, train_visual, NEIGHBOURS)
    return query, visual, text, _neighbour_mean(train_text[firsts][rows], similarity)


def random_ranking_metrics(
    groups: np.ndarray, query_groups: np.ndarray | None = None
) -> TaskMetrics:
    """Return the expected retrieval metrics if candidates are ranked in random order.

    A query with p correct answers among N candidates finds none of them in the first k with
    probability (N-p)/N * (N-p-1)/(N-1) * ... over k factors.

    Args:
        groups: (N,) group of each candidate.
        query_groups: (Q,) group of each query; None means one query for each candidate.
    """
    nan = float("nan")
    query_groups = groups if query_groups is None else query_groups
    return {
        f"{prefix}{name}": ConfidenceInterval(value, nan, nan)
        for prefix, queries, candidates in (
            ("", query_groups, groups),
            ("reverse_", groups, query_groups),
        )
        for name, value in _expected_metrics(queries, candidates).items()
    }


def _expected_metrics(queries: np.ndarray, candidates: np.ndarray) -> dict[str, float]:
    names, sizes = np.unique(candidates, return_counts=True)
    # Queries with the same number of correct answers have the same expectation.
    correct, counts = np.unique(sizes[np.searchsorted(names, queries)], return_counts=True)
    total, weights = len(candidates), counts / counts.sum()
    missed = np.ones(len(correct))
    recalls: list[float] = []
    # The median rank is where recall reaches one half; the reported recalls need k up to 10.
    while len(recalls) < total and (len(recalls) < 10 or recalls[-1] < 0.5):
        k = len(recalls)
        # The running product needs no factorials, which overflow for thousands of candidates.
        missed *= np.maximum(total - correct - k, 0) / (total - k)
        recalls.append(float(1 - missed @ weights))
    values = {f"recall_at_{k}": recalls[min(k, total) - 1] for k in (1, 5, 10)}
    values["median_rank"] = float(np.searchsorted(recalls, 0.5) + 1)
    return values


# -- features ------------------------------------------------------------------------------


def _centered(vectors: np.ndarray) -> np.ndarray:
    """Return unit vectors of brightness around its mean, (N, E)."""
    # Shapes, not the overall brightness, must decide about similarity.
    return _normalize(vectors - vectors.mean(1, keepdims=True))


def _brightness(x: np.ndarray, side: int = 12) -> np.ndarray:
    """Downsample images (N, H, W, C) or video (N, F, H, W, C) to vectors (N, E) in 0 … 255.

    Rows of another shape stay as they are.
    """
    if x.ndim < 4:
        return x.reshape(len(x), -1)
    if x.ndim == 4:
        x = x[:, None]
    N, F, H, W, C = x.shape
    step = max(H // side, 1)
    # Blocks have one size, so the remainder at the right and lower border is left out.
    h, w = H // step, W // step
    blocks = x[:, :, : h * step, : w * step].reshape(N, F, h, step, w, step, C)
    # float32 holds the sums of bytes exactly and needs half the memory of float64.
    return blocks.mean((3, 5), dtype=np.float32).reshape(N, -1)


def _nearest(x_NE: np.ndarray, train_ME: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, count) rows of the most similar training vectors, and their similarity."""
    count = min(count, len(train_ME))
    rows, values = [], []
    # Blocks of 512 rows bound the memory of the similarity matrix.
    for start in range(0, len(x_NE), 512):
        similar = x_NE[start : start + 512] @ train_ME.T
        # A partial sort suffices: few of up to MAX_TRAIN_ROWS similarities are kept.
        best = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        value = np.take_along_axis(similar, best, 1)
        order = np.argsort(-value, axis=1, kind="stable")
        rows.append(np.take_along_axis(best, order, 1))
        values.append(np.take_along_axis(value, order, 1))
    return np.concatenate(rows), np.concatenate(values)


def _neighbour_mean(vectors_NKE: np.ndarray, similarity_NK: np.ndarray) -> np.ndarray:
    """Return (N, E) means of K neighbours, with exponentially larger weights for nearer ones."""
    # With the maximum subtracted, the largest weight is 1, and exp cannot overflow.
    weights = np.exp(20 * (similarity_NK - similarity_NK.max(1, keepdims=True)))
    weights = weights / weights.sum(1, keepdims=True)
    return _normalize(np.einsum("nke,nk->ne", vectors_NKE, weights))


def _normalize(x: np.ndarray) -> np.ndarray:
    # A black image or a text without known n-grams has the norm 0.
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def _tfidf(ngrams: tuple[int, int], features: int) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Chinese text has no spaces between words; character n-grams need no segmentation.
    return TfidfVectorizer(
        analyzer="char", ngram_range=ngrams, sublinear_tf=True, max_features=features
    )


def _contents(table: pa.Table, modality: str) -> list[str]:
    return table.column(find_modality(modality).content_column).to_pylist()


def _dense(vectors: Any) -> np.ndarray:
    # Cast first: a dense array of float64 has twice the size.
    return vectors.astype(np.float32).toarray()
