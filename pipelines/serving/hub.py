"""Upload of an exported folder to the Hugging Face Hub."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin

from pipelines.training.runs.bundle_manifest import BUNDLE_MANIFEST
from skillnet_platform.errors import UserError


class ExportedFolder(ModelHubMixin):
    """Folder of ``skillnet export --to hf`` with the Hub's methods for models."""

    #: Folder of the export; not an argument, because the mixin would save it as configuration.
    folder: Path

    def _save_pretrained(self, save_directory: Path) -> None:
        shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)


def push_folder(folder: Path, repository: str, **options: Any) -> str:
    """Upload an exported model; create the repository if it does not exist.

    Args:
        folder: directory of the export.
        repository: ``owner/name``.
        **options: further arguments of ``ModelHubMixin.push_to_hub``, such as ``private`` and
            ``token``.

    Returns:
        URL of the commit.

    Raises:
        UserError: the folder is no export, or the Hub refuses it.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (folder / BUNDLE_MANIFEST).is_file():
        raise UserError(f"{folder}: no exported model. Write one: skillnet export --to hf")
    exported = ExportedFolder()
    exported.folder = folder
    try:
        return str(exported.push_to_hub(repository, **options))
    # Connection errors are OSErrors. The text of an HTTP error may hold the request's URL only.
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{repository}: the Hub refuses the upload ({type(error).__name__}). Check the name, "
            "the connection and HF_TOKEN"
        ) from None
