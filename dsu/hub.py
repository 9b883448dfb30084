"""Heads on the Hugging Face hub: which names mean one there, and fetching files into the hub's ordinary cache."""

import logging
import re
from pathlib import Path
from typing import Final

from dsu.errors import DsuError

__all__ = ["fetch", "is_hub_name", "is_repository"]

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_repository(text: str) -> bool:
    """Whether a text has the form OWNER/NAME, in the letters that the hub allows."""
    return bool(_NAME.fullmatch(text))


def is_hub_name(given: str | Path) -> bool:
    """Whether OWNER/NAME on the hub is meant: it looks like one, and there is neither such a path nor a folder OWNER.

    What begins with a folder that is here, such as `runs/tilse`, is a slip that the hub need not be asked about.
    """
    text = str(given)
    return is_repository(text) and not text.endswith(".safetensors") and not Path(text).parent.is_dir()


def fetch(repository: str, filename: str, revision: str | None = None) -> Path:
    """A file of a repository, in the hub's cache; downloaded into it where it lacks (unless HF_HUB_OFFLINE is set).

    Args:
        repository: OWNER/NAME.
        filename: in the repository.
        revision: branch, tag or commit; None is the newest.

    Raises `DsuError` saying which of the network, the repository, the revision or the file is not there.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Its retries and warnings tell a user nothing that the one sentence below does not.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(repository, filename, revision=revision))
    except GatedRepoError as error:
        raise DsuError(
            f"The repository {repository} is open only to those whom its owner lets in: ask for access on "
            f"huggingface.co/{repository}, then log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DsuError(
            f"There is no {repository}, neither as a path here nor as a repository on the Hugging Face hub that you "
            f"may read: check the name, or log in with `hf auth login` if it is private."
        ) from error
    except RevisionNotFoundError as error:
        raise DsuError(f"{repository} on the Hugging Face hub has no revision {revision!r}: check its name.") from error
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too, but it is the network that is missing
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"
        raise DsuError(
            f"There is no path {repository} here, and {filename} of that name is not in the Hugging Face cache "
            f"({reason}): check the path, go online, or copy the exported folder here and give its path."
        ) from error
    except EntryNotFoundError as error:
        raise DsuError(
            f"{repository} on the Hugging Face hub holds no {filename}, so it is no head of dsu: give one that `dsu "
            f"head export` wrote."
        ) from error
    except Exception as error:  # a broken connection, a full disk, a proxy's page: whatever the client meets
        reason = " ".join(str(error).split())[:160].rstrip(".:") or type(error).__name__
        raise DsuError(f"{repository} can't be fetched from the Hugging Face hub ({reason}): try again.") from error
