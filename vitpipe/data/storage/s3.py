"""S3-compatible object storage, read by byte range. Needs no torch.

Endpoint, region and credentials come from the standard AWS variables and files (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, ...). Transient failures are retried with exponential backoff and jitter; permanent ones
become one error for the user.
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
from vitpipe.contracts.units import counted
from vitpipe.data.storage.storage import blocks_of, changed_file

# S3 allows 10,000 parts of at least 5 MiB each: 640 GB with this size.
_PART_BYTES = 64 * 2**20
# botocore's default of 10 is below the 16 reading threads of a ShardSet; surplus connections would be
# closed after each request.
_CONNECTIONS = 32
# botocore waits 60 s in both cases; with retries a dead endpoint would block a training for minutes.
_CONNECT_SECONDS, _READ_TIMEOUT_SECONDS = 5, 30
# With the pauses below 10 attempts take about a minute (reads during training), 4 about a second (the first
# contact, where a wrong address shows).
_READ_ATTEMPTS, _FIRST_ATTEMPTS = 10, 4
_REASON_CHARACTERS = 300
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 20.0
# Transient by S3's error documentation; any status of 500 or more, 429 and throttling codes are, too.
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "TooManyRequests"}
_DENIED_CODES = {
    "403",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
}

Result = TypeVar("Result")


class S3Storage:
    """Objects below `s3://bucket/prefix`. Thread-safe; may be forked and pickled.

    Raises:
        DatasetError: when `uri` is not such an address.
    """

    is_remote = True

    def __init__(self, uri: str) -> None:
        found = S3_ADDRESS.fullmatch(uri)
        if found is None:
            raise DatasetError(
                f"'{uri}' is not the address of an object storage",
                where="data.store",
                fix="write s3://bucket/prefix, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
        self.uri, self.bucket = uri.rstrip("/"), found["bucket"]
        self._prefix = f"{(found['prefix'] or '').strip('/')}/".lstrip("/")

    def place(self, name: str) -> str:
        """Address of an object."""
        return f"{self.uri}/{name}"

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        """See `Storage.read`."""
        if size_bytes == 0:
            return b""  # HTTP has no empty range
        span = f"bytes={offset}-{offset + size_bytes - 1}"

        def get() -> bytes:
            answer = _client().get_object(Bucket=self.bucket, Key=self._prefix + name, Range=span)
            with answer["Body"] as body:
                block: bytes = body.read(size_bytes)
            # botocore checks the length of a body only when it is read to its end; `read(n)` may return less.
            expected = min(size_bytes, self._size_of(answer, name) - offset)
            if len(block) != expected:
                raise _TransferError(f"{counted(len(block), 'byte')} received instead of {expected}")
            return block

        return self._retry(get, name, _READ_ATTEMPTS)

    def size_bytes(self, name: str) -> int | None:
        """See `Storage.size_bytes`."""
        head = self._head(name)
        return None if head is None else int(head["ContentLength"])

    def sizes(self) -> dict[str, int]:
        """See `Storage.sizes`."""

        def list_all() -> dict[str, int]:
            # A listing has pages of 1,000 objects. The delimiter leaves out what is below further prefixes.
            pages = _client().get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._prefix, Delimiter="/"
            )  # fmt: skip
            found = (entry for page in pages for entry in page.get("Contents", ()))
            return {entry["Key"].removeprefix(self._prefix): entry["Size"] for entry in found}

        return self._retry(list_all, "", _FIRST_ATTEMPTS)

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
        # The object carries its SHA-256 as metadata, so an identical one is found without reading it.
        head = self._head(name)
        if head is not None and _matches(head, size, sha256):
            return False
        # Before sending: a file that changed since it was packed must not be stored under its old checksum.
        own_sha256, etag = _file_digests(path)
        if own_sha256 != sha256:
            raise changed_file(path)

        def send() -> None:
            from boto3.s3.transfer import TransferConfig

            _client().upload_file(
                str(path),
                self.bucket,
                self._prefix + name,
                # Part size and threshold must be those of `_file_digests`, which predicts the ETag.
                ExtraArgs={"Metadata": {"sha256": sha256}},
                Config=TransferConfig(
                    multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4
                ),
            )
            self._verify_upload(name, size, sha256, etag)

        self._retry(send, name, _READ_ATTEMPTS)
        return True

    def close(self) -> None:
        """See `Storage.close`. Nothing to do: connections are shared by all storages of the process."""

    def _head(self, name: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        def ask() -> dict[str, Any] | None:
            try:
                return _client().head_object(Bucket=self.bucket, Key=self._prefix + name)
            except ClientError as error:
                if _code(error) not in ("404", "NoSuchKey", "NotFound"):
                    raise
            # A response to HEAD has no body and so no error code that tells a missing bucket from a missing
            # object.
            _client().head_bucket(Bucket=self.bucket)
            return None

        return self._retry(ask, name, _FIRST_ATTEMPTS)

    def _verify_upload(self, name: str, size: int, sha256: str, etag: str) -> None:
        """Compare an uploaded object with the file that was sent.

        Raises:
            _TransferError: when they differ.
        """
        head = self._head(name)
        if head is None or not _matches(head, size, sha256):
            raise _TransferError("size or metadata of the object differ from what was sent")
        # The ETag is an MD5 that the storage computed from what it received, but not with every encryption
        # and not with every S3-compatible storage: then the object is read back.
        if head["ETag"].strip('"') == etag:
            return
        total = hashlib.sha256()
        for block in blocks_of(self, name, size):
            total.update(block)
        if total.hexdigest() != sha256:
            raise _TransferError("the checksum of the object differs from the file that was sent")

    def _retry(self, work: Callable[[], Result], name: str, attempts: int) -> Result:
        """Run `work` up to `attempts` times while it fails for a transient reason.

        Raises:
            StorageError: when the last attempt fails, or access is denied.
            DatasetError: when bucket or object do not exist.
        """
        started = time.monotonic()
        for attempt in range(attempts):
            try:
                return work()
            except VitpipeError:
                raise
            # Everything else is looked at: botocore, urllib3 and sockets have no common base class.
            except Exception as caught:
                error = _cause_of_upload_error(caught)
                reason = _transient_reason(error)
                if reason is None:
                    raise self._user_error(error, name) from error
                if attempt == attempts - 1:
                    waited = f"{attempts} times in {time.monotonic() - started:.0f} s"
                    raise StorageError(
                        f"The object storage {reason}; tried {waited}",
                        where=f"{self.place(name)} at {_client().meta.endpoint_url}",
                        fix="check that the storage is running and that AWS_ENDPOINT_URL is correct, then "
                        "run the same command again; saved work is kept",
                    ) from error
                # Half of the pause is random, so that many readers do not retry at the same moment. Not from
                # the global generator: its state belongs to the sample that is being read.
                pause = min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS)
                time.sleep(pause * random.SystemRandom().uniform(0.5, 1.0))
        raise AssertionError("attempts must be positive")

    def _user_error(self, error: Exception, name: str) -> Exception:
        """A permanent failure as an error for the user; any other exception, a defect of ours, unchanged."""
        from botocore import exceptions

        code = _code(error)
        if code == "NoSuchBucket" or (code == "404" and getattr(error, "operation_name", "") == "HeadBucket"):
            return DatasetError(
                f"The bucket '{self.bucket}' does not exist",
                where=f"{self.uri} at {_client().meta.endpoint_url}",
                fix="create it, or correct data.store and AWS_ENDPOINT_URL",
            )
        # InvalidRange: the range begins after the end of the object, which is shorter than in its manifest.
        if code in ("NoSuchKey", "404", "InvalidRange"):
            return self._missing(name)
        if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
            return StorageError(
                f"Credentials for the object storage are missing ({error})",
                where=self.uri,
                fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a role",
            )
        if code in _DENIED_CODES:
            return StorageError(
                f"The object storage denies access ({code})",
                where=self.place(name),
                fix="give these credentials permission to list, read and, for the prepare stage, write there",
            )
        if isinstance(error, exceptions.ClientError | exceptions.BotoCoreError):
            return StorageError(
                f"The request to the object storage failed ({_short(error)})",
                where=self.place(name),
                fix="correct data.store and the AWS_ environment variables",
            )
        return error

    def _size_of(self, answer: dict[str, Any], name: str) -> int:
        """Size of the whole object in bytes, from the header `Content-Range: bytes first-last/size`."""
        span = answer.get("ContentRange")
        if span is None:
            raise StorageError(
                "The object storage ignores range requests and sends whole objects",
                where=self.place(name),
                fix="use a storage, or a proxy in front of it, that supports range requests",
            )
        return int(str(span).rpartition("/")[2])

    def _missing(self, name: str) -> DatasetError:
        return DatasetError(
            "The object does not exist or is too short",
            where=self.place(name),
            fix="correct data.store, or run the prepare stage again with it: it sends missing files",
        )


class _TransferError(Exception):
    """A response is incomplete, or an uploaded object differs from the file that was sent."""


# One client per process and set of AWS variables: creating one loads botocore's service model.
_clients: dict[tuple[int, tuple[tuple[str, str], ...]], Any] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    """A new lock after a fork: another thread of the parent may have held the old one for ever."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _client() -> Any:
    """The boto3 client of this process and of the current AWS variables; clients are thread-safe."""
    # By process: a forked process that used its parent's connections would mix up both streams.
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    key = (os.getpid(), settings)
    with _lock:
        if key not in _clients:
            import boto3
            from botocore.config import Config

            config = Config(
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_READ_TIMEOUT_SECONDS,
                max_pool_connections=_CONNECTIONS,
                # botocore's retries end with the response's headers; ours cover reading its body, too.
                retries={"total_max_attempts": 1},
                # Since botocore 1.36 the default is to add CRC checksums, which not every S3-compatible
                # storage accepts; every byte is compared with our own checksums anyway.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            )
            try:
                _clients[key] = boto3.session.Session().client("s3", config=config)
            except ValueError as error:
                raise StorageError(
                    f"The address of the object storage is invalid ({error})",
                    where="AWS_ENDPOINT_URL",
                    fix="write it as http://host:port or https://host",
                ) from error
        return _clients[key]


def _cause_of_upload_error(error: Exception) -> Exception:
    """The botocore error behind boto3's S3UploadFailedError, which keeps the code in its text only."""
    from boto3.exceptions import S3UploadFailedError

    # boto3 raises it inside `except` without `from`, so the cause is the context.
    cause = error.__context__
    return cause if isinstance(error, S3UploadFailedError) and isinstance(cause, Exception) else error


def _transient_reason(error: Exception) -> str | None:
    """Why a failure is transient, as the end of a sentence; `None` for a permanent one."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, _TransferError):
        return f"sends incomplete data ({error})"
    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        transient = status >= 500 or status == 429 or _code(error) in _TRANSIENT_CODES
        return f"fails ({_code(error)})" if transient or "Throttl" in _code(error) else None
    network = (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.IncompleteReadError,
        # The body of an error was cut short, or came from a proxy and is HTML.
        ResponseParserError,
        ConnectionError,
        TimeoutError,
    )
    return f"does not respond ({_short(error)})" if isinstance(error, network) else None


def _short(error: BaseException) -> str:
    """The message of a library's error in one line, without credentials."""
    # Hidden before the line is cut: half an address would not be recognised as one.
    return hidden(" ".join(str(error).split()))[:_REASON_CHARACTERS]


def _code(error: BaseException) -> str:
    """The error code of the storage, for example NoSuchKey; empty for errors of other kinds."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _matches(head: dict[str, Any], size_bytes: int, sha256: str) -> bool:
    return head["ContentLength"] == size_bytes and head["Metadata"].get("sha256") == sha256


def _file_digests(path: Path) -> tuple[str, str]:
    """SHA-256 (hexadecimal) of a file, and its ETag on S3 when it is sent in parts of `_PART_BYTES`."""
    # One pass over the file for both. S3's ETag is the MD5 of a single upload; of a multipart upload the MD5
    # of the parts' MD5 digests, with the number of parts behind a hyphen.
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
