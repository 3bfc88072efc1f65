"""S3-compatible object storage, read by byte range. Needs no torch.

Endpoint, region and credentials come from the standard AWS variables and files (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, ...). Every request is repeated with growing, random pauses while the trouble looks as
if it will pass; what will not pass is one clear error.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vitpipe.config.data import S3_ADDRESS
from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import DatasetError, StorageError, VitpipeError
from vitpipe.contracts.files import written_aside
from vitpipe.data.storage.storage import blocks_of, changed_file

_PART_BYTES = 64 * 2**20
_CONNECTIONS = 32
_CONNECT_SECONDS, _SILENCE_SECONDS = 5, 30
# Reads in the middle of a training wait about a minute; a first contact, where a typing error shows, 1 s.
_READ_ATTEMPTS, _FIRST_ATTEMPTS = 10, 4
_REASON_CHARACTERS = 300
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 20.0
_PASSING_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "TooManyRequests"}
_REFUSED_CODES = {
    "403",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
}

Result = TypeVar("Result")


class S3Storage:
    """Objects below `s3://bucket/prefix`. Threads may share it; so may forked and unpickled copies.

    Raises:
        DatasetError: when `uri` is no such address.
    """

    is_remote = True

    def __init__(self, uri: str) -> None:
        found = S3_ADDRESS.fullmatch(uri)
        if found is None:
            raise DatasetError(
                f"'{uri}' is no address of an object storage",
                fix="write s3://bucket/prefix; credentials come from AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY",
            )
        self.uri, self.bucket = uri.rstrip("/"), found["bucket"]
        self._prefix = f"{(found['prefix'] or '').strip('/')}/".lstrip("/")

    def place(self, name: str) -> str:
        """Address of an object."""
        return f"{self.uri}/{name}"

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """See `Storage.read`."""
        if size_bytes == 0:
            return b""
        span = f"bytes={offset}-{offset + size_bytes - 1}"

        def get() -> bytes:
            answer = _client().get_object(Bucket=self.bucket, Key=self._prefix + name, Range=span)
            with answer["Body"] as body:
                block: bytes = body.read(size_bytes)
            expected = min(size_bytes, self._size_of(answer, name) - offset)
            if len(block) != expected:
                raise _ArrivedWrongError(f"{len(block)} bytes came instead of {expected}")
            return block

        return self._patiently(get, name, _READ_ATTEMPTS)

    def size_bytes(self, name: str) -> int | None:
        """See `Storage.size_bytes`."""
        head = self._head(name)
        return None if head is None else int(head["ContentLength"])

    def sizes(self) -> dict[str, int]:
        """See `Storage.sizes`."""

        def list_all() -> dict[str, int]:
            pages = _client().get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._prefix, Delimiter="/"
            )  # fmt: skip
            found = (entry for page in pages for entry in page.get("Contents", ()))
            return {entry["Key"].removeprefix(self._prefix): entry["Size"] for entry in found}

        return self._patiently(list_all, "", _FIRST_ATTEMPTS)

    def fetch(self, name: str, to: Path) -> None:
        """See `Storage.fetch`."""
        size = self.size_bytes(name)
        if size is None:
            raise self._missing(name)
        with written_aside(to) as aside, aside.open("wb") as file:
            for block in blocks_of(self, name, size):
                file.write(block)

    def put(self, path: Path, name: str, sha256: str) -> bool:
        """See `Storage.put`."""
        size = path.stat().st_size
        head = self._head(name)
        if head is not None and _is(head, size, sha256):
            return False
        own_sha256, etag = _file_digests(path)
        if own_sha256 != sha256:
            raise changed_file(path)

        def send() -> None:
            from boto3.s3.transfer import TransferConfig

            _client().upload_file(
                str(path),
                self.bucket,
                self._prefix + name,
                ExtraArgs={"Metadata": {"sha256": sha256}},
                Config=TransferConfig(
                    multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4
                ),
            )
            self._check_arrival(name, size, sha256, etag)

        self._patiently(send, name, _READ_ATTEMPTS)
        return True

    def close(self) -> None:
        """See `Storage.close`; the process's connections are shared with other storages and stay."""

    def _head(self, name: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        def ask() -> dict[str, Any] | None:
            try:
                return _client().head_object(Bucket=self.bucket, Key=self._prefix + name)
            except ClientError as error:
                if _code(error) not in ("404", "NoSuchKey", "NotFound"):
                    raise
            # The answer to HEAD has no body, so it does not say whether the bucket or the object is missing.
            _client().head_bucket(Bucket=self.bucket)
            return None

        return self._patiently(ask, name, _FIRST_ATTEMPTS)

    def _check_arrival(self, name: str, size: int, sha256: str, etag: str) -> None:
        """Compare with the storage's own MD5; where it keeps another tag, read the object back."""
        head = self._head(name)
        if head is None or not _is(head, size, sha256):
            raise _ArrivedWrongError("the object is not what was sent")
        if head["ETag"].strip('"') == etag:
            return
        total = hashlib.sha256()
        for block in blocks_of(self, name, size):
            total.update(block)
        if total.hexdigest() != sha256:
            raise _ArrivedWrongError("the object has another checksum than the file that was sent")

    def _patiently(self, work: Callable[[], Result], name: str, attempts: int) -> Result:
        """Do it again while it fails in a way that may pass; at most `attempts` times."""
        started = time.monotonic()
        for attempt in range(attempts):
            try:
                return work()
            except VitpipeError:
                raise
            except Exception as caught:
                error = _unwrapped(caught)
                reason = _reason_to_wait(error)
                if reason is None:
                    raise self._final(error, name) from error
                if attempt == attempts - 1:
                    waited = f"{attempts} times in {time.monotonic() - started:.0f} s"
                    raise StorageError(
                        f"The object storage {reason}; tried {waited}",
                        where=f"{self.place(name)} at {_client().meta.endpoint_url}",
                        fix="check that the storage runs and that AWS_ENDPOINT_URL is right, then run the "
                        "same command again; what is finished and saved is kept",
                    ) from error
                # Half of the pause is random, so that many readers do not come back at the same moment.
                pause = min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS)
                time.sleep(pause * random.SystemRandom().uniform(0.5, 1.0))
        raise AssertionError("attempts must be positive")

    def _final(self, error: Exception, name: str) -> Exception:
        """What will not pass, as an error for the user; a defect of ours stays what it is."""
        from botocore import exceptions

        code = _code(error)
        if code == "NoSuchBucket" or (code == "404" and getattr(error, "operation_name", "") == "HeadBucket"):
            return DatasetError(
                f"There is no bucket '{self.bucket}'",
                where=f"{self.uri} at {_client().meta.endpoint_url}",
                fix="make it, or correct data.store and AWS_ENDPOINT_URL",
            )
        if code in ("NoSuchKey", "404", "InvalidRange"):
            return self._missing(name)
        if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
            return StorageError(
                f"There are no credentials for the object storage ({error})",
                where=self.uri,
                fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a role",
            )
        if code in _REFUSED_CODES:
            return StorageError(
                f"The object storage refuses access ({code})",
                where=self.place(name),
                fix="give these credentials the right to list, read and, for the prepare stage, write there",
            )
        if isinstance(error, exceptions.ClientError | exceptions.BotoCoreError):
            return StorageError(
                f"The object storage cannot be used ({_short(error)})",
                where=self.place(name),
                fix="correct data.store and the AWS_ variables",
            )
        return error

    def _size_of(self, answer: dict[str, Any], name: str) -> int:
        """Size of the whole object, from `bytes first-last/size`."""
        span = answer.get("ContentRange")
        if span is None:
            raise StorageError(
                "The object storage sends whole objects where a range was asked for",
                where=self.place(name),
                fix="use a storage, or a proxy before it, that answers range requests",
            )
        return int(str(span).rpartition("/")[2])

    def _missing(self, name: str) -> DatasetError:
        return DatasetError(
            "The object storage has no such object, or only a shorter one",
            where=self.place(name),
            fix="check data.store, or run the prepare stage again with it: it sends what is missing",
        )


class _ArrivedWrongError(Exception):
    """An answer was cut short, or an upload is not what was sent."""


_clients: dict[tuple[int, tuple[tuple[str, str], ...]], Any] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    """Another thread of the parent may have held the lock when this process was forked."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _client() -> Any:
    """The client of this process: connections must not be shared with the process it was forked from."""
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    key = (os.getpid(), settings)
    with _lock:
        if key not in _clients:
            import boto3
            from botocore.config import Config

            config = Config(
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_SILENCE_SECONDS,
                max_pool_connections=_CONNECTIONS,
                retries={"total_max_attempts": 1},  # ours cover the body of an answer, too
                # Checksums beyond what every S3-compatible storage understands; we have our own.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            )
            try:
                _clients[key] = boto3.session.Session().client("s3", config=config)
            except ValueError as error:
                raise StorageError(
                    f"The object storage's address cannot be used ({error})",
                    where="AWS_ENDPOINT_URL",
                    fix="write it as http://host:port or https://host",
                ) from error
        return _clients[key]


def _unwrapped(error: Exception) -> Exception:
    """What was the matter with an upload, out of boto3's own wrapping."""
    from boto3.exceptions import S3UploadFailedError

    cause = error.__context__
    return cause if isinstance(error, S3UploadFailedError) and isinstance(cause, Exception) else error


def _reason_to_wait(error: Exception) -> str | None:
    """Why a failed request may work later, as the end of a sentence; None when it will not."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, _ArrivedWrongError):
        return f"answers incompletely ({error})"
    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        passes = status >= 500 or status == 429 or _code(error) in _PASSING_CODES
        return f"fails ({_code(error)})" if passes or "Throttl" in _code(error) else None
    network = (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.IncompleteReadError,
        ResponseParserError,
        ConnectionError,
        TimeoutError,
    )
    return f"does not answer ({_short(error)})" if isinstance(error, network) else None


def _short(error: BaseException) -> str:
    """What a library says, in one line; credentials are hidden before the line is cut inside an address."""
    return hidden(" ".join(str(error).split()))[:_REASON_CHARACTERS]


def _code(error: BaseException) -> str:
    """The storage's own code of an error, for example NoSuchKey; empty for errors of other kinds."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _is(head: dict[str, Any], size_bytes: int, sha256: str) -> bool:
    return head["ContentLength"] == size_bytes and head["Metadata"].get("sha256") == sha256


def _file_digests(path: Path) -> tuple[str, str]:
    """Hex SHA-256 of a file, and the tag that S3 gives it when it is sent in our parts."""
    whole, parts = hashlib.sha256(), []
    with path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            whole.update(part)
            parts.append(hashlib.md5(part, usedforsecurity=False))
    if path.stat().st_size < _PART_BYTES:
        tag = parts[0].hexdigest() if parts else hashlib.md5(usedforsecurity=False).hexdigest()
    else:
        joined = b"".join(part.digest() for part in parts)
        tag = f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"
    return whole.hexdigest(), tag
