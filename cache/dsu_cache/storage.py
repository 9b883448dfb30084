"""Objects on S3 or a compatible service: six operations with limited retries, and errors in one sentence.

Credentials come only from environment variables (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
`AWS_ENDPOINT_URL` ...), read at the first request; they are never stored or printed.
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
"""Maximum number of retries after a transient failure; the delay doubles each time."""
RETRY_SECONDS: Final = 60
"""Time after which a request is not retried any more."""
_NO_BUCKET: Final = re.compile(r"NoSuchBucket")
_REASONS: Final = (
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|40[13] |Unauthenticated|PermissionDenied",
        "no permission",
    ),
    (r"169\.254\.|[Cc]redential", "no credentials"),
    (r"SlowDown|503 ", "it is overloaded: 503"),
    (r" 5\d\d ", "it fails"),
    (r"404 ", "no S3 service answers there: 404"),
    (r"operation timed out", "it does not answer in time"),
    (r"error sending request|tcp connect|dns error", "it can't be reached"),
    (r"", "the transfer was cut off"),
)
"""Reasons by patterns of error texts; the first match counts."""
_REMEDIES: Final = {
    "no permission": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and their permissions",
    "no credentials": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}

_T = TypeVar("_T")


class RemoteError(CacheError):
    """A request to S3 failed, after retries."""


@dataclass(frozen=True)
class ListedObject:
    """A listed object: its key below the prefix, its size, when it was written, and its ETag."""

    key: str
    nbytes: int
    changed: datetime
    tag: str | None


class Bucket:
    """The objects below `s3://bucket/prefix`.

    A client is created in the process that uses it, at the first request. A process that was forked after its parent
    created a client would hang, so it is refused.

    Args:
        url: the URL of the prefix.

    Raises:
        CacheError: the URL is invalid.
        RemoteError: raised by every operation, with the problem and the fix; also if the bucket is gone.
    """

    def __init__(self, url: str) -> None:
        name, _, prefix = url.removeprefix(SCHEME).strip("/").partition("/")
        parts = prefix.split("/") if prefix else []
        if not url.startswith(SCHEME) or not re.fullmatch(r"[A-Za-z0-9._-]{3,63}", name):
            raise CacheError(f"{url} names no bucket: write s3://BUCKET or s3://BUCKET/PATH")
        if not all(part.strip(".") and part.isprintable() for part in parts):
            raise CacheError(f"{url!r} is not a path in a bucket: write s3://BUCKET/PATH")
        self.url: Final = SCHEME + "/".join([name, *parts])
        self._name, self._prefix = name, "".join(f"{part}/" for part in parts)

    def get(self, key: str) -> bytes:
        """An object's content. Raises FileNotFoundError if the bucket exists but the object does not."""
        return bytes(self._request(lambda obs, client: obs.get(client, self._prefix + key).bytes(), key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Part of an object's content, of exactly the requested length. Raises as `get`."""
        place = self._prefix + key
        return bytes(self._request(lambda obs, client: obs.get_range(client, place, start=start, length=length), key))

    def put(self, key: str, content: bytes) -> None:
        """Write an object atomically, replacing an existing one."""
        self._request(lambda obs, client: obs.put(client, self._prefix + key, content, use_multipart=False), key)

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """Write an object unless the key exists; returns whether the object contains `content` now.

        An equal object that exists already was written by another process, or by this one if the response was lost.
        """
        from obstore.exceptions import AlreadyExistsError

        def put(obs: Any, client: Any) -> None:
            obs.put(client, self._prefix + key, content, mode="create", use_multipart=False)

        try:
            self._request(put, key, AlreadyExistsError)
        except AlreadyExistsError:
            return self.get(key) == content
        return True

    def put_if_unchanged(self, key: str, content: bytes, before: bytes | None) -> bool:
        """Replace an object that contains `before` (None: that does not exist); returns whether it contains `content`
        now."""
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
            self._request(put, key, PreconditionError)
        except (PreconditionError, FileNotFoundError):
            return False
        return bool(found["is"] == content)

    def check_conditions(self, key: str) -> None:
        """Raise `RemoteError` if the server ignores "if absent" and overwrites; `key` is used for the test."""
        self.put(key, b"first")
        refused = not self.put_if_absent(key, b"second")
        self.delete([key])
        if not refused:
            raise RemoteError(
                f"{self.url} can't contain stores: its server ignores If-None-Match and overwrites existing objects, "
                "so two writers would lose each other's samples"
            )

    def put_named(self, key: str, content: bytes) -> None:
        """Write an object whose key identifies its content; an existing one is kept if it is intact, else replaced."""
        if not self.put_if_absent(key, content):
            self.put(key, content)

    def list(self, folder: str = "") -> Sequence[ListedObject]:
        """All objects below a folder."""
        place = self._prefix + folder

        def pages(obs: Any, client: Any) -> list[ListedObject]:
            listed = (one for page in obs.list(client, place, chunk_size=1000) for one in page)
            return [
                ListedObject(one["path"].removeprefix(self._prefix), one["size"], one["last_modified"], one["e_tag"])
                for one in listed
            ]

        return self._request(pages, folder)

    def folders(self, folder: str = "") -> Sequence[str]:
        """The names of the folders in a folder."""
        place = self._prefix + folder
        found = self._request(lambda obs, client: obs.list_with_delimiter(client, place)["common_prefixes"], folder)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; missing ones are skipped."""
        if keys:
            self._request(lambda obs, client: obs.delete(client, [self._prefix + key for key in keys]), keys[0])

    def _request(self, act: Callable[[Any, Any], _T], key: str, *passed_on: type[Exception]) -> _T:
        """The result of one operation; errors become sentences."""
        obs, client = _client(self._name)
        try:
            return act(obs, client)
        except passed_on:
            raise
        except FileNotFoundError as error:
            if not _NO_BUCKET.search(str(error)):
                if "NoSuchKey" not in str(error):  # the server may be no S3 service, or lack the bucket
                    self.folders()
                raise FileNotFoundError(f"{self.url}/{key} is missing") from None
            raise self._remote_error(str(error)) from None
        except Exception as error:  # obstore raises a different class for each kind of error, and what it wraps
            raise self._remote_error(f"{type(error).__name__} {error}") from None

    def _remote_error(self, text: str) -> RemoteError:
        """The sentence for an error; obstore's own text may be long and reveal too much."""
        where = f"{SCHEME}{self._name}"
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        at = f" at {_without_user(endpoint)}" if endpoint else ""
        if _NO_BUCKET.search(text):
            return RemoteError(f"there is no bucket {where}{at}: check its name, AWS_REGION and AWS_ENDPOINT_URL")
        said = text.partition("Debug source")[0]
        reason = next(told for pattern, told in _REASONS if re.search(pattern, said))
        remedy = _REMEDIES.get(reason, "finished work is kept; run the same command again later")
        return RemoteError(f"{where}{at} can't be used ({reason}): {remedy}")


def _without_user(endpoint: str) -> str:
    return re.sub(r"//[^/@]*@", "//", endpoint)


_CLIENT_PROCESS: list[int] = []
"""The process that created the first client."""


def _client(bucket: str) -> tuple[Any, Any]:
    """obstore, and this process's client."""
    if os.getpid() not in _CLIENT_PROCESS and _CLIENT_PROCESS:
        raise RemoteError(
            "S3 can't be used in a process that was forked from one that used it: start workers with "
            'multiprocessing_context="spawn"'
        )
    try:
        import obstore
    except ModuleNotFoundError:
        raise RemoteError("stores on S3 need obstore, which is not installed: pip install obstore") from None
    made = _make_client(bucket)
    _CLIENT_PROCESS[:] = [os.getpid()]
    return obstore, made


@cache
def _make_client(bucket: str) -> Any:
    from obstore.store import S3Store

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    # So that S3 refuses data that was corrupted in transit.
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
        raise RemoteError(f"s3://{bucket} can't be used: the AWS_ variables contradict each other") from error
