"""Exceptions of DVC, git and the clients of DVC's remotes, converted to errors without credentials."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from vitpipe.config.data import PinnedConfig
from vitpipe.contracts.address import Address, hidden
from vitpipe.contracts.errors import DatasetError, StorageError, VitpipeError

# HTTP clients quote whole URLs and chains of retries; a message is one paragraph.
_REASON_CHARACTERS = 300
# Settings of a DVC remote whose values are credentials: `password`, `secret_access_key`, `sas_token`, ...
_SECRET_SETTING = re.compile(r"passw|token|secret|key|credential|connection_string")
HOW_TO_SIGN_IN = (
    "leave user and password out of data.pinned.repo and provide them by a credential helper in the git "
    "configuration (whose file GIT_CONFIG_GLOBAL can set), or by the program that GIT_ASKPASS names"
)


@contextmanager
def dvc_errors(
    config: PinnedConfig, remote: str = "", settings: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Convert exceptions of DVC, git and the clients of DVC's remotes to errors for the user.

    Args:
        remote: name of the DVC remote that is read; empty while the repository is opened.
        settings: the remote's settings; None while the repository is opened.

    Raises:
        DatasetError: for everything that the user or the owner of the repository can correct.
        StorageError: if the remote does not answer or refuses.
    """
    from dvc.config import RemoteConfigError
    from dvc.exceptions import DvcException, FileMissingError, NotDvcRepoError
    from dvc.scm import CloneError, RevError, SCMError
    from dvc_data.index.index import DataIndexError

    repo, place = str(config.repo), str((settings or {}).get("url", remote))
    secrets = _secrets_in(config.repo) | _secrets_of_remote(settings or {})
    try:
        yield
    except VitpipeError:
        raise
    # Subclasses before their bases: RevError and CloneError are SCMErrors, the others DvcExceptions.
    except RevError as error:
        raise DatasetError(
            f"The repository has no revision '{config.revision}'",
            where=repo,
            fix="set data.pinned.revision to a commit, tag or branch that has been pushed",
        ) from error
    except RemoteConfigError as error:
        raise DatasetError(
            f"The repository has no such DVC remote ({_one_line(error, secrets)})",
            where=repo,
            fix="correct data.pinned.remote, or set a default remote in the repository's .dvc/config",
        ) from error
    except (FileNotFoundError, FileMissingError, DataIndexError) as error:
        raise _missing_files(config, place or repo, error, secrets) from error
    except (CloneError, SCMError, NotDvcRepoError) as error:
        raise _cannot_open(config, error, secrets) from error
    except DvcException as error:
        raise DatasetError(
            f"DVC cannot read revision {config.revision} ({_reason(error, secrets)})",
            where=repo,
            fix="run `dvc list REPO --rev REVISION`, and correct the file of the repository that it names",
        ) from error
    except Exception as error:
        # Everything is caught: dulwich and git raise many types, whose text may quote the URL with password.
        if settings is None:
            raise _cannot_open(config, error, secrets) from error
        raise _remote_error(place or repo, error, secrets) from error


def _cannot_open(config: PinnedConfig, error: BaseException, secrets: set[str]) -> DatasetError:
    return DatasetError(
        f"The repository cannot be opened ({_reason(error, secrets)})",
        where=str(config.repo),
        fix="correct data.pinned.repo and try `git clone` and `dvc list` with it on this machine; if it "
        f"requires credentials, {HOW_TO_SIGN_IN}",
    )


def _missing_files(config: PinnedConfig, remote: str, error: Exception, secrets: set[str]) -> VitpipeError:
    """Files are missing in the remote, or the remote did not answer."""
    # dvc-data reports a failed request to the remote as missing files too; then the S3 or HTTP client's own
    # exception is among the causes.
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__module__.split(".")[0] in ("botocore", "aiohttp", "aiobotocore"):
            return _remote_error(remote, cause, secrets)
        cause = cause.__cause__ or cause.__context__
    return DatasetError(
        f"Files of '{config.path}' at revision {config.revision} are missing in the DVC remote",
        where=remote,
        fix="check out that revision where the data was prepared and run `dvc push`, or set "
        "data.pinned.remote to the remote that has them",
    )


def _remote_error(remote: str, error: BaseException, secrets: set[str]) -> VitpipeError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise error  # the local disk, which the caller reports
    return StorageError(
        f"The DVC remote cannot be read ({_reason(error, secrets)})",
        where=remote,
        fix="check that the server runs, and its URL and credentials (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, "
        "... for S3), then run the same command again",
    )


def _secrets_in(address: Address) -> set[str]:
    """The parts of a URL that its text form hides, which libraries quote without the rest of the URL."""
    try:
        parts = urlsplit(address.secret)
    except ValueError:
        return set()
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    words = {user, password, *(value for _, value in parse_qsl(parts.query))}
    shown = str(address)
    # Both forms: exceptions quote the URL as given (percent-encoded), dulwich decodes user and password.
    return {word for word in words | {unquote(word) for word in words} if word and word not in shown}


def _secrets_of_remote(settings: Mapping[str, Any]) -> set[str]:
    own = {str(value) for name, value in settings.items() if _SECRET_SETTING.search(name) and value}
    return own | _secrets_in(Address(str(settings.get("url", ""))))


def _reason(error: BaseException, secrets: set[str]) -> str:
    """The innermost cause on one line, without credentials; outer exceptions of DVC say only `SCM error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _one_line(error, secrets)


def _one_line(error: BaseException, secrets: set[str]) -> str:
    """The text of an exception on one line, without credentials."""
    text = hidden(" ".join(str(error).split()))
    # Longest first: a secret may contain another one.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text[:_REASON_CHARACTERS] or type(error).__name__
