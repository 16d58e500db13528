"""Methods of models for raw inputs: texts, images, audio, videos and code.

:class:`RawInputModel` is the base of all models. This package knows no files of corpora, so a model
asks its processor to read the inputs; it is loaded at the first use.

    model = SkillNet.from_pretrained("my-model")
    texts, images = model.encode_text(["红色方块"]), model.encode_image([picture])
    model.similarity(texts, images)

Shapes: N and M inputs, E width of the vectors.
"""

import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import torch
from torch import Tensor

from skillnet.serialization import check_inside, read_manifest
from skillnet.skills import nearest_hint

#: ``module:function`` that returns the :class:`InputProcessor` of a model. A name, so that this
#: package imports no higher one.
PROCESSOR = "pipelines.serving.model_processor:open_processor"
#: ``module:function`` that writes a model with the files of its predictions, if it has them.
SAVER = "pipelines.serving.model_processor:save_described"
#: ``module:function`` that trains a model.
FITTER = "pipelines.fitting.fit:fit_model"


class TaskVectors(Tensor):
    """Vectors (N, E) of one task. Vectors of different tasks cannot be compared."""

    task: str = ""


class InputProcessor(Protocol):
    """Preprocessing of a model's training, and the names of its outputs."""

    def __call__(
        self, inputs: Sequence[Any], task: str, tower: str = "input"
    ) -> dict[str, Tensor]: ...

    def encode(
        self, modality: str, inputs: Sequence[Any], task: str | None, tower: str | None = None
    ) -> TaskVectors: ...

    def classify(self, inputs: Sequence[Any], task: str | None, top: int) -> list[Any]: ...

    def predict(
        self, rows: Any, task: str | None, top: int | None, embeddings: bool, **columns: str
    ) -> Any: ...

    def transcribe(self, recordings: Sequence[Any], task: str | None) -> list[str]: ...

    def push_to_hub(self, repository: str, **options: Any) -> str: ...


class RawInputModel:
    """Base of models that encode, classify and transcribe raw inputs.

    Media are given in memory, as a path, or as the bytes of a file. A string is a text where a
    method reads texts or code, and elsewhere a path. ``task`` may be left out where the model has
    one task for the method: one of its objective, or one retrieval task that reads the modality,
    or, without such a task, one of another kind. Vectors of a retrieval task have length 1; others
    are means of the real tokens.
    """

    #: Folder of the saved model; None for a new model.
    origin: Path | None
    _processor: InputProcessor | None = None

    @property
    def processor(self) -> InputProcessor:
        """Preprocessing of the model's training; ``processor(inputs, task)`` returns a batch.

        Raises:
            ValueError: the model was not read from a folder with a tokenizer and output names.
        """
        if self._processor is None:
            self._processor = pkgutil.resolve_name(PROCESSOR)(self)
        return self._processor

    def encode_inputs(
        self, modality: str, inputs: Sequence[Any], task: str | None = None
    ) -> TaskVectors:
        """Return the vectors (N, E) of inputs of a modality, which may be another package's.

        Args:
            modality: name of the modality; the methods below are for built-in ones.
            inputs: paths, bytes of files, or inputs in memory that the modality accepts.
            task: see the class.
        """
        return self.processor.encode(modality, inputs, task)

    def encode_text(self, texts: Sequence[str], task: str | None = None) -> TaskVectors:
        """Return the vectors (N, E) of texts.

        Args:
            texts: N texts.
            task: see the class; in a retrieval task the texts are queries.
        """
        return self.processor.encode("text", texts, task)

    def encode_image(self, images: Sequence[Any], task: str | None = None) -> TaskVectors:
        """Return the vectors (N, E) of images.

        Args:
            images: Pillow images, uint8 pixels (H, W, 3), paths, or bytes of files.
            task: see the class.
        """
        return self.processor.encode("image", images, task)

    def encode_audio(self, recordings: Sequence[Any], task: str | None = None) -> TaskVectors:
        """Return the vectors (N, E) of recordings.

        Args:
            recordings: (samples, rate in Hz), paths, or bytes of files. Samples are int16, or
                floats in [-1, 1]; mono (samples,) or stereo (samples, 2).
            task: see the class.
        """
        return self.processor.encode("sound", recordings, task)

    def encode_video(self, videos: Sequence[Any], task: str | None = None) -> TaskVectors:
        """Return the vectors (N, E) of videos.

        Args:
            videos: uint8 frames (N, H, W, 1 or 3), paths, or bytes of files.
            task: see the class.
        """
        return self.processor.encode("video", videos, task)

    def encode_code(self, functions: Sequence[str], task: str | None = None) -> TaskVectors:
        """Return the vectors (N, E) of functions in Python.

        Args:
            functions: source of one function each; its docstring is not read.
            task: see the class.
        """
        return self.processor.encode("code", functions, task)

    def classify(self, inputs: Sequence[Any], task: str | None = None, top: int = 5) -> list[Any]:
        """Return the best class of each input, with its probability and the next ones.

        Args:
            inputs: raw values of the modality that the task reads: texts, or media as in
                ``encode_image`` and the like. Without ``task``, a text that names a file is
                refused.
            task: a classification task; None takes the one that an input belongs to.
            top: number of classes that are listed.

        Returns:
            A :class:`pipelines.serving.predictor.TaskPrediction` per input. Without ``task``, an
            input has one of each task that reads such inputs; its ``task`` is "" if the model is
            unsure.
        """
        return self.processor.classify(inputs, task, top)

    def predict(
        self,
        rows: Any,
        task: str | None = None,
        top: int | None = None,
        embeddings: bool = False,
        **columns: str,
    ) -> Any:
        """Return a table of the same kind, with the columns of the rows and of their predictions.

        The added columns are those of ``skillnet predict``: ``task``, ``answer``, ``score`` and
        ``confidence``. Unusable rows are reported and left out.

        Args:
            rows: a data frame, an Arrow table or a list of mappings. A row has a text, or a path,
                bytes or decoded media in a column such as ``image``.
            task: for rows that do not name one; None takes the one that an input belongs to.
            top: number of alternatives; None leaves them out.
            embeddings: whether answers have the vector of their row, too.
            **columns: ``text_column`` or ``file_column``, where the names are no common ones.

        Raises:
            ValueError: the rows are no table, or none of them is usable.
        """
        return self.processor.predict(rows, task, top, embeddings, **columns)

    def transcribe(self, recordings: Sequence[Any], task: str | None = None) -> list[str]:
        """Return the transcripts of recordings.

        Args:
            recordings: see :meth:`encode_audio`.
            task: a CTC task; None takes the only one.
        """
        return self.processor.transcribe(recordings, task)

    def fit(
        self, data: Any, settings: Mapping[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Train the model in place, without Ray and MLflow, and evaluate it.

        Args:
            data: task -> its rows (a data frame, a list of mappings, or a path), or a
                :class:`pipelines.fitting.TrainingData`.
            settings: dotted key of ``skillnet finetune`` -> value, such as ``training.steps``.
            **options: ``output``, ``run_dir``, ``callbacks``, ``loggers``, ``losses`` and
                ``metrics``, see :func:`pipelines.fitting.fit.fit_model`.

        Returns:
            Steps, seconds, losses, and ``evaluation``: tidy rows.

        Raises:
            ValueError: data and model do not fit, or a setting is invalid.
        """
        result: dict[str, Any] = pkgutil.resolve_name(FITTER)(self, data, settings, **options)
        return result

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the model with its tokenizer and a model card to the Hugging Face Hub.

        Args:
            repository: ``owner/name``; created if it does not exist.
            **options: further arguments of ``huggingface_hub.ModelHubMixin.push_to_hub``, such as
                ``private``.

        Returns:
            URL of the commit.
        """
        return self.processor.push_to_hub(repository, **options)

    @staticmethod
    def similarity(first: Tensor, second: Tensor) -> Tensor:
        """Return the cosine of each pair of vectors, (N, M).

        Args:
            first: vectors (N, E).
            second: vectors (M, E) of the same task.

        Raises:
            ValueError: the vectors belong to different tasks.
        """
        tasks = [getattr(vectors, "task", "") for vectors in (first, second)]
        if all(tasks) and tasks[0] != tasks[1]:
            raise ValueError(
                f"vectors of {tasks[0]} and of {tasks[1]} cannot be compared. Encode both with one "
                f"task, for example task={tasks[1]!r}"
            )
        a, b = (torch.as_tensor(vectors).as_subclass(Tensor) for vectors in (first, second))
        normalized = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (a, b))
        first_NE, second_ME = normalized
        return first_NE @ second_ME.T


#: ``owner/name`` of a repository.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: Files of a model beside its weights; the manifest first.
ABOUT = ("manifest.json", "config.json", "tokenizer.json")


def find_model_folder(
    address: str | Path, task: str | None = None, revision: str | None = None
) -> Path:
    """Return the folder of a saved model; download it if it is a repository of the Hub.

    Args:
        address: a folder, or ``owner/name`` of a repository. A folder of this name comes first.
        task: download only the files that this task reads.
        revision: branch, tag or commit of the repository; None takes the newest commit.

    Raises:
        ValueError: the repository is not available, is no saved model, or has no such task or
            revision; or a revision is given for a folder.
    """
    folder = Path(address).expanduser()
    if isinstance(address, Path) or folder.exists() or not REPOSITORY.fullmatch(address):
        if revision is not None:
            raise ValueError(
                f"{address}: revision={revision!r} is for a repository of the Hub, not for a "
                "folder. Leave it out, or give owner/name"
            )
        return folder
    folder = _download(address, list(ABOUT), revision)
    if task is None:
        return _download(address, [*ABOUT, "*.safetensors", "captions-*.json"], revision)
    manifest = read_manifest(folder)
    tasks = manifest.get("tasks")
    files = tasks.get(task) if isinstance(tasks, dict) else None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        known = list(tasks) if isinstance(tasks, dict) else []
        raise ValueError(f"{address}: no task {task!r}{nearest_hint(task, known)}")
    for name in files:
        check_inside(folder / "manifest.json", name)
    others = [f"captions-{task}.*", f"inputs-{task}.*"]
    return _download(address, [*ABOUT, *files, *others], revision)


def _download(repository: str, patterns: list[str], revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Real files, because the loader rejects links; the Hub's cache consists of them.
    name = repository.replace("/", "--") + (f"@{quote(revision, safe='')}" if revision else "")
    folder = Path(constants.HF_HOME) / "skillnet" / name
    try:
        snapshot_download(repository, revision=revision, allow_patterns=patterns, local_dir=folder)
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        wanted = f"revision {revision}" if revision else "it"
        raise ValueError(
            f"{repository}: no folder of this name, and the Hub does not provide {wanted} "
            f"({type(error).__name__}). Check the name, the connection and HF_TOKEN"
        ) from None
    return folder
