"""Files on the Hugging Face hub: recognise names of repositories, and download files into the hub's cache."""

import logging
import re
from pathlib import Path
from textwrap import shorten

from huggingface_hub import constants

from dsu.errors import DsuError

_log = logging.getLogger(__name__)


class OutOfReachError(Exception):
    """A file is not in the hub's cache, and the hub can't be reached; the text is a clause with the reason."""


def is_repository(text: str) -> bool:
    """Whether a text has the form OWNER/NAME, with the characters that the hub allows."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text, re.ASCII))


def is_hub_name(given: str | Path) -> bool:
    """Whether a text means OWNER/NAME on the hub: it has this form, and there is no local folder OWNER.

    A text that begins with an existing folder, such as `runs/tilse`, is a misspelt path, not a repository.
    """
    text = str(given)
    return is_repository(text) and not text.endswith((".safetensors", ".onnx")) and not Path(text).parent.is_dir()


def download(repository: str, filename: str, revision: str | None = None) -> Path:
    """The path of a repository's file in the hub's cache, after downloading it if it is missing.

    A log message precedes the request, since the answer may take a while. Raises `OutOfReachError` if the file is not
    cached and the hub can't be reached, and otherwise as `huggingface_hub.hf_hub_download`.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    # Hide its retries and warnings: our error message is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    cached = isinstance(try_to_load_from_cache(repository, filename, revision=revision), str)
    if not constants.HF_HUB_OFFLINE:
        _log.info("asking %s for %s of %s (HF_HUB_OFFLINE=1 skips this)", host(), filename, repository)
        if not cached:
            _check_reachable(repository, filename, revision)
    elif not cached:
        raise OutOfReachError("HF_HUB_OFFLINE is set")
    try:
        return Path(hf_hub_download(repository, filename, revision=revision, etag_timeout=_timeout()))
    except LocalEntryNotFoundError as error:
        raise OutOfReachError(f"{host()} answers with errors") from error


def fetch(repository: str, filename: str, revision: str | None = None) -> Path:
    """Download a file of a shared head, as `download`.

    Args:
        repository: OWNER/NAME.
        filename: name in the repository.
        revision: branch, tag or commit; None: the newest commit.

    Raises `DsuError` naming what is missing: the network, the repository, the revision or the file.
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
    except Exception as error:  # a broken connection, a full disk, a proxy's page: the client raises many types
        raise DsuError(
            f"{repository} can't be downloaded from the Hugging Face hub ({reason_of(error)}): try again."
        ) from error


def host() -> str:
    """The hub's host name: huggingface.co, unless HF_ENDPOINT names a mirror."""
    return str(constants.ENDPOINT).partition("://")[2]


def reason_of(error: Exception) -> str:
    """The message of an error from the hub's client, as a short clause."""
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
    return shorten(text, 160, placeholder=" ...").rstrip(".:") or type(error).__name__


def _check_reachable(repository: str, filename: str, revision: str | None) -> None:
    """Send a single request: `hf_hub_download` would try six times in 25 seconds, and has no setting to change this."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision), timeout=_timeout())
    except (HfHubHTTPError, HFValidationError):
        return  # the hub has answered; the download will raise the right error
    except Exception as error:  # DNS, routing, certificates or a proxy; httpx's or requests' types, by version
        raise OutOfReachError(f"{host()} can't be reached: {reason_of(error)}") from error


def _timeout() -> float:
    """Timeout of requests in seconds: 5, unless HF_HUB_ETAG_TIMEOUT is set."""
    configured = constants.HF_HUB_ETAG_TIMEOUT
    return configured if configured != constants.DEFAULT_ETAG_TIMEOUT else 5
