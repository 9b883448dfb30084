"""Files on the Hugging Face hub: recognise their names, and download them into the hub's ordinary cache."""

import logging
import re
from pathlib import Path
from textwrap import shorten

from huggingface_hub import constants

from dsu.errors import DsuError

__all__ = ["OutOfReachError", "download", "fetch", "host", "is_hub_name", "is_repository", "reason_of"]

_log = logging.getLogger(__name__)


class OutOfReachError(Exception):
    """The hub could not be asked for a file that its cache lacks; the text is a clause that says why."""


def is_repository(text: str) -> bool:
    """Whether a text has the form OWNER/NAME, in the letters that the hub allows."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text, re.ASCII))


def is_hub_name(given: str | Path) -> bool:
    """Whether OWNER/NAME on the hub is meant: it looks like one, and there is neither such a path nor a folder OWNER.

    What begins with a folder that is here, such as `runs/tilse`, is a slip that the hub need not be asked about.
    """
    text = str(given)
    return is_repository(text) and not text.endswith((".safetensors", ".onnx")) and not Path(text).parent.is_dir()


def download(repository: str, filename: str, revision: str | None = None) -> Path:
    """A file of a repository, in the hub's cache; downloaded into it where it lacks.

    That the hub is asked is logged beforehand, since the answer may take a while. Raises `OutOfReachError` if it
    can't be asked and the cache has no such file; else as `huggingface_hub.hf_hub_download`.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    # Its retries and warnings tell a user nothing that one sentence of ours does not.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    cached = isinstance(try_to_load_from_cache(repository, filename, revision=revision), str)
    if not constants.HF_HUB_OFFLINE:
        _log.info("asking %s for %s of %s (HF_HUB_OFFLINE=1 skips this)", host(), filename, repository)
        if not cached:
            _check_reachable(repository, filename, revision)
    elif not cached:
        raise OutOfReachError("HF_HUB_OFFLINE is set")
    try:
        return Path(hf_hub_download(repository, filename, revision=revision, etag_timeout=_patience()))
    except LocalEntryNotFoundError as error:
        raise OutOfReachError(f"{host()} answers with errors") from error


def fetch(repository: str, filename: str, revision: str | None = None) -> Path:
    """As `download`, for a head that somebody shared.

    Args:
        repository: OWNER/NAME.
        filename: in the repository.
        revision: branch, tag or commit; None is the newest.

    Raises `DsuError` saying which of the network, the repository, the revision or the file is not there.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return download(repository, filename, revision)
    except OutOfReachError as error:
        raise DsuError(
            f"There is no path {repository} here, and its {filename} is not in the Hugging Face cache "
            f"({error}): check the path, go online, or copy the exported folder here and give its path."
        ) from error
    except GatedRepoError as error:
        raise DsuError(
            f"The repository {repository} is gated: request access on "
            f"huggingface.co/{repository}, then log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DsuError(
            f"There is no {repository}, neither as a local path nor as a repository on the Hugging Face hub that you "
            "may read: check the name, or log in with `hf auth login` if it is private."
        ) from error
    except RevisionNotFoundError as error:
        raise DsuError(f"{repository} on the Hugging Face hub has no revision {revision!r}: check its name.") from error
    except EntryNotFoundError as error:
        raise DsuError(
            f"{repository} on the Hugging Face hub has no {filename}, so it is not a dsu head: give one from `dsu "
            "head export`."
        ) from error
    except Exception as error:  # a broken connection, a full disk, a proxy's page: whatever the client meets
        raise DsuError(
            f"{repository} can't be downloaded from the Hugging Face hub ({reason_of(error)}): try again."
        ) from error


def host() -> str:
    """Who is asked: huggingface.co, unless HF_ENDPOINT names a mirror."""
    return str(constants.ENDPOINT).partition("://")[2]


def reason_of(error: Exception) -> str:
    """What the hub's client says of a failure, as a short clause."""
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
    return shorten(text, 160, placeholder=" ...").rstrip(".:") or type(error).__name__


def _check_reachable(repository: str, filename: str, revision: str | None) -> None:
    """One request, made once: `hf_hub_download` makes it six times in 25 seconds, and no setting of it says fewer."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision), timeout=_patience())
    except (HfHubHTTPError, HFValidationError):
        return  # an answer; what it means is said by who downloads
    except Exception as error:  # no name, no route, no certificate, no proxy: of httpx or requests, by version
        raise OutOfReachError(f"{host()} can't be reached: {reason_of(error)}") from error


def _patience() -> float:
    """Seconds that the hub is given to answer: 5, unless HF_HUB_ETAG_TIMEOUT gives others."""
    asked = constants.HF_HUB_ETAG_TIMEOUT
    return asked if asked != constants.DEFAULT_ETAG_TIMEOUT else 5
