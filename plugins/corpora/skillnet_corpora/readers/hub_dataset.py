"""Format ``hf``: a data set of the Hugging Face Hub, streamed from a pinned commit.

    --corpus topics=hf:owner/name             the newest commit
    --corpus topics=hf:owner/name@v1          a branch, a tag or a commit

Nothing is downloaded whole: files are read in ranges, by the file system of ``huggingface_hub``.
A branch or tag can move, so its commit is resolved once, all files are read from this commit, and
the manifest names it. ``HF_TOKEN`` opens private data sets, and ``HF_ENDPOINT`` another server.
The files are those that the format ``folder`` reads in a downloaded repository.
"""

import re
from typing import Any

from pipelines.data.io.directory import SourceDirectory, digest_listing
from skillnet_corpora.readers.folder import FolderCorpus
from skillnet_platform import console
from skillnet_platform.errors import UserError, first_line, list_hub_errors

#: ``owner/name`` or ``owner/name@revision``.
_PLACE = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")


class HubDatasetCorpus(FolderCorpus):
    """Rows of a data set of the Hub.

    Attributes:
        repository: owner and name.
        revision: branch, tag or commit that the user names; None for the newest commit.
        commit: commit that is read.
    """

    name = "hf"

    def __init__(self, place: str, options: Any = None, name: str | None = None) -> None:
        found = _PLACE.fullmatch(place)
        if found is None:
            raise UserError(f"hf:{place}: expected hf:OWNER/NAME, or hf:OWNER/NAME@REVISION")
        self.repository, self.revision = found["repository"], found["revision"]
        self.commit = resolve_commit(self.repository, self.revision)
        if self.revision is None:
            console.print_note(
                f"{self.repository}: reads the commit {self.commit}. To read it again: "
                f"hf:{self.repository}@{self.commit}"
            )
        super().__init__(f"hf://datasets/{self.repository}@{self.commit}", options, name)

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return None: a user names the Hub."""
        return None

    def extra_sources(self) -> list[dict[str, str]]:
        """Return the data set with its commit, which decides all bytes of its files."""
        count, size, digest = digest_listing(map(self.note_unread, self.source.walk()))
        about = f"hf:{self.repository}@{self.revision or 'main'}: {count} files, {size} bytes"
        return [{"file": about, "sha256": digest, "revision": self.commit}]


def resolve_commit(repository: str, revision: str | None) -> str:
    """Return the commit of a branch, tag or commit of a data set.

    Args:
        repository: owner and name.
        revision: branch, tag or commit; None takes the newest one of the main branch.

    Raises:
        UserError: there is no such data set or revision, it needs a token, or the Hub does not
            answer.
    """
    # Other corpora do not need the client.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"hf:{repository}" + (f"@{revision}" if revision else "")
    try:
        found = HfApi().dataset_info(repository, revision=revision, timeout=60).sha
    except RevisionNotFoundError:
        raise UserError(f"{where}: no such branch, tag or commit") from None
    except GatedRepoError:
        raise UserError(
            f"{where}: its owner has to grant access. Ask on its page, and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{where}: no such data set. If it is private, set HF_TOKEN to a token that reads it"
        ) from None
    except list_hub_errors() as error:
        raise UserError(
            f"{where}: the Hub does not answer ({first_line(error)}). Run the same command again "
            "when it does, or download the data set and give its folder"
        ) from None
    if not found:
        raise UserError(f"{where}: the Hub names no commit. Name one: hf:{repository}@COMMIT")
    return str(found)
