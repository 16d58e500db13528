"""A trained model with its vocabulary and names: texts and media files in, answers out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluation.inference import InferenceRunner, memory_inputs
from pipelines.evaluation.tables import sort_rows
from pipelines.transforms import code, image, sound, text, video
from skillnet.multitask_model import TaskModel
from skillnet.skills import SkillPlan, find_task
from skillnet_platform.errors import UserError

MODALITY_SUFFIXES = {
    "sound": (".mp3", ".wav", ".flac", ".ogg", ".opus", ".m4a", ".aac"),
    "image": (".png", ".jpg", ".jpeg", ".svg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "video": (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"),
    "code": (".py", ".pyi"),
    "text": (".txt",),
}

#: Keys under which corpora say to how many tokens they cut texts, code and captions.
TRUNCATION_KEYS = {
    "text": ("max_tokens", "tokens"),
    "code": ("max_code_tokens", "code_tokens"),
    "query": ("max_caption_tokens", "caption_tokens"),
}

#: First bytes of common formats, for data that comes without a name.
MAGIC_BYTES = (
    (b"\x89PNG", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF8", "image"),
    (b"<svg", "image"),
    (b"ID3", "sound"),
    (b"\xff\xfb", "sound"),
    (b"\xff\xf3", "sound"),
    (b"fLaC", "sound"),
    (b"OggS", "sound"),
    (b"\x1aE\xdf\xa3", "video"),
)


@dataclass(frozen=True)
class PredictionItem:
    """One thing to predict for: a text, or a media file's bytes.

    Args:
        name: what to call it in the answer: a path, or the text itself.
        text: the text, or none.
        data: the bytes, or none.
        task: the task to run, or none to choose by what the input is.
        keywords: what stands beside the text, for a corpus that was prepared with it.
        where: where it stands, for messages; the name where that is not given.
        may_be_empty: whether an empty text is predicted for, too.
    """

    name: str
    text: str | None = None
    data: bytes | None = None
    task: str | None = None
    keywords: str | None = None
    where: str = ""
    may_be_empty: bool = False


@dataclass(frozen=True)
class TaskPrediction:
    """An answer.

    Args:
        input: what it is for; of a Python file, each function is one input.
        task: the task that was run.
        answer: best class, transcript, or the known caption nearest to a picture, clip or
            function. Empty for a text in a retrieval task: its vector is the result.
        score: probability of the class; geometric mean of the transcript's probabilities;
            cosine similarity of the caption.
        alternatives: the best answers with their scores, the first one included.
        embedding: retrieval: the input's unit vector.
    """

    input: str
    task: str
    answer: str
    score: float
    alternatives: list[tuple[str, float]] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class CaptionBank:
    """Known captions of a retrieval task and their vectors, (N, E) unit length."""

    captions: list[str]
    embeddings: np.ndarray


class TaskPredictor:
    """Runs a model on raw inputs.

    Args:
        model: the trained model.
        tokenizer: of the corpora it was trained on.
        names: task -> names of its classes or symbols (symbol 1 first).
        banks: task -> known captions.
        limits: task -> longest sequence of the task's own modality, as in training.
        prepared: task -> how its corpus was prepared, so that inputs are prepared alike.
        precision: see :class:`pipelines.evaluation.inference.InferenceRunner`.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Any,
        names: Mapping[str, Sequence[str]],
        banks: Mapping[str, CaptionBank] | None = None,
        limits: Mapping[str, int | None] | None = None,
        precision: str = "auto",
        prepared: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.names, self.banks, self.limits = dict(names), dict(banks or {}), dict(limits or {})
        self.prepared = dict(prepared or {})
        self.runner = InferenceRunner(model, precision)

    def predict(
        self,
        items: Sequence[PredictionItem],
        top: int = 5,
        on_bad: Callable[[int, str], None] | None = None,
    ) -> list[TaskPrediction]:
        """Answers, in the order of the items; a Python file gives one per function.

        Args:
            items: what to predict for.
            top: how many alternatives.
            on_bad: called with the number of an item that cannot be read, and why: it may raise,
                or leave it out. None raises.

        Raises:
            UserError: an input that cannot be read, or that no task of the model takes; names it.
        """
        jobs: list[tuple[str, str, str, np.ndarray]] = []  # task, tower, name, array
        for number, item in enumerate(items):
            try:
                task, tower, plan = self._route(item)
                arrays = self._arrays(item, task, tower, plan)
            except UserError as problem:
                if on_bad is None:
                    raise
                on_bad(number, str(problem))
                continue
            jobs += [(task, tower, name, array) for name, array in arrays]
        out: list[TaskPrediction | None] = [None] * len(jobs)
        for key in dict.fromkeys((task, tower) for task, tower, _, _ in jobs):
            places = [i for i, job in enumerate(jobs) if job[:2] == key]
            answers = self._run(*key, [jobs[i][3] for i in places], top)
            for place, (answer, score, others, vector) in zip(places, answers, strict=True):
                out[place] = TaskPrediction(jobs[place][2], key[0], answer, score, others, vector)
        return [prediction for prediction in out if prediction is not None]

    def tokens(self, texts: Sequence[str], limit: int) -> list[np.ndarray]:
        """Token ids of each text, cut after ``limit``."""
        return [np.array(row or [1], np.int32) for row in self._encode(texts, limit)]

    def embed_texts(self, task: str, texts: Sequence[str]) -> np.ndarray:
        """Vectors of queries in a retrieval task's space, (N, E) unit length."""
        plan = find_task(task, self.model.config.tasks).towers["query"]
        rows = self.tokens([words.strip() for words in texts], self._longest(task, "query"))
        return self.runner.embed(task, "query", memory_inputs(rows, plan, self.model.config))

    def _longest(self, task: str, reads: str) -> int:
        """Tokens kept of a text, of code or of a query: as in training."""
        said = self.prepared.get(task, {})
        kept = [said[key] for key in TRUNCATION_KEYS[reads] if said.get(key)]
        if reads == "query":
            kept = kept or [text.CAPTION_TOKENS]
        elif limit := self.limits.get(task):
            kept.append(limit)
        return min([*kept, self.model.config.max_tokens])

    def _encode(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        return text.encode_texts(self.tokenizer, list(texts), limit).to_pylist()

    # -- which task, and what it reads -----------------------------------------------------

    def _route(self, item: PredictionItem) -> tuple[str, str, SkillPlan]:
        """(task, tower, plan) for an item."""
        tasks = self.model.config.tasks
        modality = "text" if item.data is None else guess_modality(item.name, item.data)
        if item.task is not None:
            spec = find_task(item.task, tasks)
            for tower in ("input", "candidate", "query"):
                if tower in spec.towers and spec.towers[tower].modality == modality:
                    return item.task, tower, spec.towers[tower]
            reads = sorted({plan.modality for plan in spec.towers.values()})
            raise UserError(
                f"{item.name}: {item.task} reads {' or '.join(reads)}, this is {modality}"
            )
        for name in sort_rows(tasks):
            towers = tasks[name].towers
            for tower in ("input", "candidate"):
                if tower in towers and towers[tower].modality == modality:
                    return name, tower, towers[tower]
        raise UserError(
            f"{item.name}: no task of this model reads {modality}; it has {', '.join(tasks)}"
        )

    def _arrays(
        self, item: PredictionItem, task: str, tower: str, plan: SkillPlan
    ) -> list[tuple[str, np.ndarray]]:
        """Named inputs of the model; several for a file of functions."""
        config = self.model.config
        data, alike = item.data or b"", self.prepared.get(task, {})
        try:
            if plan.modality == "text":
                words = (item.text if item.text is not None else _decoded(data)).strip()
                if not words and not item.may_be_empty:
                    raise ValueError("the text is empty")
                if alike.get("keywords") and tower != "query":
                    words = text.append_keywords(words, item.keywords)
                longest = self._longest(task, "query" if tower == "query" else "text")
                return [(item.name, self.tokens([words], longest)[0])]
            if plan.modality == "image":
                fit = alike.get("fit", "pad")
                return [(item.name, image.load_pixels(data, config.image_size, fit))]
            if plan.modality == "sound":
                seconds = alike.get("max_seconds")
                frames = round(seconds * 100) if seconds else sound.MAX_FRAMES
                return [(item.name, sound.load_log_mel(data, frames, alike.get("trim", True)))]
            if plan.modality == "video":
                size = config.video_size
                return [(item.name, video.load_video_frames(data, config.video_frames, size))]
            found = list(code.parse_functions(code.decode_source(data)))
            if not found:
                raise ValueError("there is no function in it")
            rows = self.tokens([f.code for f in found], self._longest(task, "code"))
            names = [f"{item.name}:{f.line} {f.name}" for f in found]
            return list(zip(names, rows, strict=True))
        except ValueError as problem:
            raise UserError(f"{item.where or item.name}: {problem}") from None

    # -- running ---------------------------------------------------------------------------

    def _run(
        self, task: str, tower: str, arrays: list[np.ndarray], top: int
    ) -> list[tuple[str, float, list[tuple[str, float]], list[float]]]:
        spec = find_task(task, self.model.config.tasks)
        inputs = memory_inputs(arrays, spec.towers[tower], self.model.config)
        if spec.objective == "classification":
            probabilities = self.runner.classify(task, inputs)
            return [(*_best(self.names[task], row, top), []) for row in probabilities]
        if spec.objective == "ctc":
            said, confidence = self.runner.transcribe(task, inputs)
            names = self.names[task]
            # Characters stand side by side; names of sounds stand apart.
            space = "" if all(len(name) == 1 for name in names[1:]) else " "
            words = [space.join(names[symbol - 1] for symbol in row) for row in said]
            return [
                (word, float(score), [(word, float(score))], [])
                for word, score in zip(words, confidence, strict=True)
            ]
        vectors = self.runner.embed(task, tower, inputs)
        bank = self.banks.get(task)
        answers: list[tuple[str, float, list[tuple[str, float]], list[float]]] = []
        for vector in vectors:
            if tower == "query" or bank is None:
                answers.append(("", float("nan"), [], vector.tolist()))
            else:
                best = _best(bank.captions, bank.embeddings @ vector, top)
                answers.append((*best, vector.tolist()))
        return answers


def read_input_item(path: str | Path, task: str | None = None) -> PredictionItem:
    """A file as an item.

    Raises:
        UserError: there is no such file, it cannot be read, or it is empty.
    """
    data = read_file_bytes(Path(path), "; a text is given with --text")
    if not data:
        raise UserError(f"{path}: the file is empty")
    return PredictionItem(str(path), None, data, task)


def read_file_bytes(path: Path, otherwise: str = "") -> bytes:
    """All of a file.

    Args:
        path: of the file.
        otherwise: what to do if there is none, at the end of the message.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{otherwise}") from None
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror})") from None


def guess_modality(name: str, data: bytes) -> str:
    """What a file is, by its name, else by its first bytes.

    Raises:
        UserError: neither tells.
    """
    suffix = Path(name).suffix.lower()
    for modality, suffixes in MODALITY_SUFFIXES.items():
        if suffix in suffixes:
            return modality
    head = data[:64].lstrip()
    for magic, modality in MAGIC_BYTES:
        if head.startswith(magic):
            return modality
    if head[:4] == b"RIFF":
        return {b"WAVE": "sound", b"WEBP": "image"}.get(head[8:12], "video")
    if head[4:8] == b"ftyp":
        return "video"
    known = ", ".join(suffix for suffixes in MODALITY_SUFFIXES.values() for suffix in suffixes)
    raise UserError(f"{name}: cannot tell what it is; name it with one of {known}")


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None


def _best(
    names: Sequence[str], scores: np.ndarray, top: int
) -> tuple[str, float, list[tuple[str, float]]]:
    order = np.argsort(-scores, kind="stable")[:top]
    ranked = [(names[int(place)], float(scores[place])) for place in order]
    return ranked[0][0], ranked[0][1], ranked
