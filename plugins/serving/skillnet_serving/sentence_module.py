"""A task as a module of Sentence Transformers, which mteb and others load.

    model = SentenceTransformer("my-task", trust_remote_code=True)
    model.encode_query(["红色的心"])
    model.encode_document([image])

The library asks for ``trust_remote_code`` because this module is not its own; no code comes from
the folder. It is a folder of ``skillnet export --to hf`` with the library's list of modules.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule

from skillnet.modality import find_modality
from skillnet.multitask_model import TaskModel
from skillnet.raw_inputs import find_model_folder
from skillnet.skills import Task, find_task
from skillnet.systems import load_model
from skillnet_platform.errors import UserError
from skillnet_serving.exported_folder import save_described_model

#: Modality of media here -> in Sentence Transformers. Its texts may be code.
THEIR_NAMES = {"sound": "audio"}
#: Kind of an ``encode_query`` or ``encode_document`` there -> tower.
TOWER_OF_KIND = {"query": "query", "document": "candidate"}


class SkillNetModule(InputModule):
    """Raw inputs in, ``sentence_embedding`` (B, E) out.

    Args:
        model: read from a folder with the names of its outputs, or trained by ``fit``.
        task: names the skills.
    """

    config_file_name: str = "sentence_skillnet.json"
    config_keys = ["task"]  # noqa: RUF012
    save_in_root: bool = True

    def __init__(self, model: TaskModel, task: str) -> None:
        super().__init__()
        self._spec = find_task(task, model.config.tasks)
        self.model, self.task = model.eval(), task

    @property
    def modalities(self) -> list[Any]:
        """Modalities that a tower of the task reads, by the library's names."""
        return list(dict.fromkeys(_name_modality(self._spec, tower) for tower in self._spec.towers))

    def get_embedding_dimension(self) -> int:
        """Return E: the width of the retrieval space, else of the model."""
        paired = len(self._spec.towers) > 1
        return int(self.model.config.embedding_dim if paired else self.model.config.dim)

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Find the tower of raw inputs; they are read by :meth:`forward`.

        Args:
            inputs: texts, codes, or media as the library accepts them, all of one modality. A
                string is a path where the tower reads media.
            prompt: put before each text.
            **kwargs: ``task`` is ``query`` or ``document`` for the methods of these names.

        Raises:
            UserError: no tower of the task reads such inputs.
        """
        kind = infer_modality(inputs[0], self.modalities) if inputs else self.modalities[0]
        towers = [t for t in self._spec.towers if _name_modality(self._spec, t) == kind]
        wanted = TOWER_OF_KIND.get(str(kwargs.get("task")))
        if not towers:
            raise UserError(f"{self.task} reads {', '.join(self.modalities)}, not {kind}")
        tower = wanted if wanted in towers else towers[0]
        if find_modality(self._spec.towers[tower].modality).reads_tokens:
            return {"raw": [f"{prompt or ''}{value}" for value in inputs], "tower": tower}
        return {"raw": [_read_medium(value) for value in inputs], "tower": tower}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return the features with the vectors of the inputs.

        Args:
            features: result of :meth:`preprocess`.
            **kwargs: not used.
        """
        modality = self._spec.towers[features["tower"]].modality
        vectors = self.model.processor.encode(
            modality, features["raw"], self.task, features["tower"]
        )
        plain = vectors.as_subclass(torch.Tensor)
        features["sentence_embedding"] = plain.to(next(self.model.parameters()).device)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the model with tokenizer, names of outputs and card.

        Args:
            output_path: existing folder of the library, which has other files.
            *args: not used.
            **kwargs: not used.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / Path(output_path).name
            save_described_model(self.model, folder)
            shutil.copytree(folder, output_path, dirs_exist_ok=True)
        self.save_config(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "SkillNetModule":
        """Read a saved model.

        Args:
            model_name_or_path: folder, or ``owner/name`` of the Hugging Face Hub.
            subfolder: not used: the files are in the root.
            token: for the file of this module; the model itself takes ``HF_TOKEN``.
            cache_folder: the same, with ``HF_HOME``.
            revision: branch, tag or commit of the repository.
            local_files_only: ask no server for the file of this module.
            init_defaults: not used.
            **kwargs: not used.

        Raises:
            ValueError: files are missing or altered.
        """
        config = cls.load_config(
            model_name_or_path,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        task = str(config["task"])
        return cls(load_model(find_model_folder(model_name_or_path, task, revision), task), task)


def _name_modality(spec: Task, tower: str) -> str:
    name = spec.towers[tower].modality
    return "text" if find_modality(name).reads_tokens else THEIR_NAMES.get(name, name)


def _read_medium(value: Any) -> Any:
    """Return a medium of Sentence Transformers as ``SkillNet`` reads it."""
    if isinstance(value, Mapping):
        array = np.asarray(value["array"])
        return (array, int(value["sampling_rate"])) if "sampling_rate" in value else array
    if isinstance(value, torch.Tensor):
        return value.numpy()
    return Path(value) if isinstance(value, str) else value
