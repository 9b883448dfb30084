"""Objects of S3, and of what speaks its language: six operations, retried within limits, and told of in one sentence.

Who may read and write comes from environment variables alone (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_REGION`, `AWS_ENDPOINT_URL` ...), at the moment of the first request; nothing keeps or prints them.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final, TypeVar

from dsu_cache.files import CacheError

SCHEME: Final = "s3://"
RETRIES: Final = 8
"""How often a request is repeated that fails for a reason that may pass; the waits between double."""
RETRY_SECONDS: Final = 60
"""After which it is not repeated any more."""
_GONE: Final = re.compile(r"NoSuchBucket")
_REASONS: Final = (
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|40[13] |Unauthenticated|PermissionDenied",
        "no permission",
    ),
    (r"169\.254\.|[Cc]redential", "no credentials"),
    (r"SlowDown|503 ", "it is overloaded: 503"),
    (r" 5\d\d ", "it fails"),
    (r"404 ", "no S3 answers there: 404"),
    (r"operation timed out", "it does not answer in time"),
    (r"error sending request|tcp connect|dns error", "it can't be reached"),
    (r"", "the transfer was cut off"),
)
"""What errors' texts say, the first that fits."""
_REMEDIES: Final = {
    "no permission": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do there",
    "no credentials": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}

_T = TypeVar("_T")


class RemoteError(CacheError):
    """S3 does not do what it is asked, and has been asked often enough."""


@dataclass(frozen=True)
class Found:
    """An object as it is listed: its key below the prefix, its bytes, when it was written, and what stands for it."""

    key: str
    nbytes: int
    changed: datetime
    tag: str | None


class Bucket:
    """The objects below `s3://bucket/prefix`.

    Clients are made in the process that uses them, at the first request. One that was forked from a process that had
    made any would wait for ever: it is refused.

    Args:
        url: of the prefix.

    Raises:
        CacheError: no such URL is possible.
        RemoteError: by every operation, saying what is wrong and what may help; that the bucket is gone, too.
    """

    def __init__(self, url: str) -> None:
        name, _, prefix = url.removeprefix(SCHEME).strip("/").partition("/")
        parts = prefix.split("/") if prefix else []
        if not url.startswith(SCHEME) or not re.fullmatch(r"[A-Za-z0-9._-]{3,63}", name):
            raise CacheError(f"{url} names no bucket: write s3://BUCKET or s3://BUCKET/PATH")
        if not all(part.strip(".") and part.isprintable() for part in parts):
            raise CacheError(f"{url!r} names no place in a bucket: write s3://BUCKET/PATH")
        self.url: Final = SCHEME + "/".join([name, *parts])
        self._name, self._prefix = name, "".join(f"{part}/" for part in parts)

    def get(self, key: str) -> bytes:
        """An object's content. Raises FileNotFoundError where there is none, in a bucket that is there."""
        return bytes(self._do(lambda obs, client: obs.get(client, self._prefix + key).bytes(), key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """A part of an object's content, as long as asked for. Raises as `get`."""
        place = self._prefix + key
        return bytes(self._do(lambda obs, client: obs.get_range(client, place, start=start, length=length), key))

    def put(self, key: str, content: bytes) -> None:
        """Write an object, in place of one that is there: whole or not at all."""
        self._do(lambda obs, client: obs.put(client, self._prefix + key, content, use_multipart=False), key)

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """Write an object unless there is one of that key; whether it holds `content` now.

        One that is there already and equal was written so: by someone else, or by us, and the answer was lost.
        """
        from obstore.exceptions import AlreadyExistsError

        def put(obs: Any, client: Any) -> None:
            obs.put(client, self._prefix + key, content, mode="create", use_multipart=False)

        try:
            self._do(put, key, AlreadyExistsError)
        except AlreadyExistsError:
            return self.get(key) == content
        return True

    def put_if_unchanged(self, key: str, content: bytes, before: bytes | None) -> bool:
        """Write an object that holds `before` (None: that is not there); whether it holds `content` now."""
        from obstore.exceptions import PreconditionError

        if before is None:
            return self.put_if_absent(key, content)
        place, found = self._prefix + key, dict[str, Any]()

        def put(obs: Any, client: Any) -> None:
            answer = obs.get(client, place)
            found["is"] = bytes(answer.bytes())
            if found["is"] == before:
                mode = {"e_tag": answer.meta["e_tag"]}
                obs.put(client, place, content, mode=mode, use_multipart=False)
                found["is"] = content

        try:
            self._do(put, key, PreconditionError)
        except (PreconditionError, FileNotFoundError):
            return False
        return bool(found["is"] == content)

    def check_conditions(self, key: str) -> None:
        """Raise `RemoteError` where the server does not know "if absent", but writes anyway; `key` is for trying it."""
        self.put(key, b"first")
        refused = not self.put_if_absent(key, b"second")
        self.delete([key])
        if not refused:
            raise RemoteError(
                f"{self.url} can't hold stores: its server overwrites what is to be written only if absent "
                f"(If-None-Match), so two writers would lose each other's samples"
            )

    def put_named(self, key: str, content: bytes) -> None:
        """Write an object whose key names its content: one that is there is right, or damaged and replaced."""
        if not self.put_if_absent(key, content):
            self.put(key, content)

    def list(self, folder: str = "") -> Sequence[Found]:
        """All objects below a folder."""
        place = self._prefix + folder

        def pages(obs: Any, client: Any) -> list[Found]:
            listed = (one for page in obs.list(client, place, chunk_size=1000) for one in page)
            return [
                Found(one["path"].removeprefix(self._prefix), one["size"], one["last_modified"], one["e_tag"])
                for one in listed
            ]

        return self._do(pages, folder)

    def folders(self, folder: str = "") -> Sequence[str]:
        """The names of the folders in a folder."""
        place = self._prefix + folder
        found = self._do(lambda obs, client: obs.list_with_delimiter(client, place)["common_prefixes"], folder)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects, where they are there."""
        if keys:
            self._do(lambda obs, client: obs.delete(client, [self._prefix + key for key in keys]), keys[0])

    def _do(self, act: Callable[[Any, Any], _T], key: str, *passed_on: type[Exception]) -> _T:
        """What comes of one operation; errors as sentences."""
        obs, client = _client(self._name)
        try:
            return act(obs, client)
        except passed_on:
            raise
        except FileNotFoundError as error:
            if not _GONE.search(str(error)):
                if "NoSuchKey" not in str(error):  # who answers so may be no S3, or one without the bucket
                    self.folders()
                raise FileNotFoundError(f"{self.url}/{key} is missing") from None
            raise self._told(str(error)) from None
        except Exception as error:  # obstore raises a class of its own for each kind, and what it wraps
            raise self._told(f"{type(error).__name__} {error}") from None

    def _told(self, text: str) -> RemoteError:
        """The sentence for an error; what obstore says of it may be long, and name more than it should."""
        where = f"{SCHEME}{self._name}"
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        at = f" at {_without_user(endpoint)}" if endpoint else ""
        if _GONE.search(text):
            return RemoteError(f"there is no bucket {where}{at}: check its name, AWS_REGION and AWS_ENDPOINT_URL")
        said = text.partition("Debug source")[0]
        reason = next(told for pattern, told in _REASONS if re.search(pattern, said))
        remedy = _REMEDIES.get(reason, "what is finished stays finished; run the same command again when it answers")
        return RemoteError(f"{where}{at} can't be used ({reason}): {remedy}")


def _without_user(endpoint: str) -> str:
    return re.sub(r"//[^/@]*@", "//", endpoint)


_MADE_IN: list[int] = []
"""The process that has made the first client."""


def _client(bucket: str) -> tuple[Any, Any]:
    """obstore, and a client of this process."""
    if os.getpid() not in _MADE_IN and _MADE_IN:
        raise RemoteError(
            "S3 can't be used in a process that was forked from one that used it: start workers by spawning "
            '(multiprocessing_context="spawn")'
        )
    try:
        import obstore
    except ModuleNotFoundError:
        raise RemoteError("stores on S3 need obstore, which is not installed: pip install obstore") from None
    made = _made(bucket)
    _MADE_IN[:] = [os.getpid()]
    return obstore, made


@cache
def _made(bucket: str) -> Any:
    from obstore.store import S3Store

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    # So that S3 refuses what was altered on its way there.
    config: Any = {"checksum_algorithm": "sha256"}
    if not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys():
        config["region"] = "us-east-1"
    if endpoint:
        config["endpoint"] = endpoint
    try:
        return S3Store(
            bucket,
            config=config,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": "10s",
                "timeout": "300s",
            },
            retry_config={
                "max_retries": RETRIES,
                "retry_timeout": timedelta(seconds=RETRY_SECONDS),
                "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2},
            },
        )
    except Exception as error:
        raise RemoteError(f"s3://{bucket} can't be used: the AWS_ variables do not make sense together") from error
