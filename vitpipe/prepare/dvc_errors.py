"""What DVC, git and the libraries of DVC's remotes raise, as errors for the user that hold no credentials."""

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

_REASON_CHARACTERS = 300
# Settings of a DVC remote whose values are credentials: `password`, `secret_access_key`, `sas_token`, ...
_SECRET_SETTING = re.compile(r"passw|token|secret|key|credential|connection_string")
HOW_TO_SIGN_IN = (
    "leave user and password out of data.pinned.repo and let git find them: a credential helper in the git "
    "configuration (GIT_CONFIG_GLOBAL may name its file), or the program that GIT_ASKPASS names"
)


@contextmanager
def dvc_errors(
    config: PinnedConfig, remote: str = "", settings: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Turn what DVC, git and the libraries of its remotes raise into errors for the user.

    Args:
        remote: the DVC remote that is read; empty while the repository is opened.
        settings: of that remote; None while the repository is opened.

    Raises:
        DatasetError: whatever the user or the owner of the repository can correct.
        StorageError: when the remote does not answer or refuses.
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
    except RevError as error:
        raise DatasetError(
            f"The repository has no revision '{config.revision}'",
            where=repo,
            fix="correct data.pinned.revision: a commit, tag or branch that has been pushed",
        ) from error
    except RemoteConfigError as error:
        raise DatasetError(
            f"The repository has no such DVC remote ({_one_line(error, secrets)})",
            where=repo,
            fix="correct data.pinned.remote, or set a default remote in its .dvc/config",
        ) from error
    except (FileNotFoundError, FileMissingError, DataIndexError) as error:
        raise _not_there(config, place or repo, error, secrets) from error
    except (CloneError, SCMError, NotDvcRepoError) as error:
        raise _unopened(config, error, secrets) from error
    except DvcException as error:
        raise DatasetError(
            f"DVC cannot read revision {config.revision} ({_reason(error, secrets)})",
            where=repo,
            fix="see what `dvc list` of the repository says at that revision",
        ) from error
    except Exception as error:
        if settings is None:  # git's; whatever it is, its text may quote the address
            raise _unopened(config, error, secrets) from error
        raise _remote_trouble(place or repo, error, secrets) from error


def _unopened(config: PinnedConfig, error: BaseException, secrets: set[str]) -> DatasetError:
    return DatasetError(
        f"The repository cannot be opened ({_reason(error, secrets)})",
        where=str(config.repo),
        fix="correct data.pinned.repo and see that `git clone` and `dvc list` of it work from here; if it "
        f"asks who you are, {HOW_TO_SIGN_IN}",
    )


def _not_there(config: PinnedConfig, remote: str, error: Exception, secrets: set[str]) -> VitpipeError:
    """The remote has not got the files; or it could not be asked, which DVC reports in the same way."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__module__.split(".")[0] in ("botocore", "aiohttp", "aiobotocore"):
            return _remote_trouble(remote, cause, secrets)
        cause = cause.__cause__ or cause.__context__
    return DatasetError(
        f"The DVC remote has not got all files of '{config.path}' at revision {config.revision}",
        where=remote,
        fix="check out that revision where the data is and run `dvc push`, or name the right remote "
        "in data.pinned.remote",
    )


def _remote_trouble(remote: str, error: BaseException, secrets: set[str]) -> VitpipeError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise error  # the disk on this side
    return StorageError(
        f"The DVC remote cannot be read ({_reason(error, secrets)})",
        where=remote,
        fix="see that it runs and that its address and credentials are right (AWS_ENDPOINT_URL, "
        "AWS_ACCESS_KEY_ID, ... for S3), then run the same command again",
    )


def _secrets_in(address: Address) -> set[str]:
    """What an address has and its text form hides; libraries quote parts of it, too."""
    try:
        parts = urlsplit(address.secret)
    except ValueError:
        return set()
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    words = {user, password, *(value for _, value in parse_qsl(parts.query))}
    shown = str(address)
    return {word for word in words | {unquote(word) for word in words} if word and word not in shown}


def _secrets_of_remote(settings: Mapping[str, Any]) -> set[str]:
    own = {str(value) for name, value in settings.items() if _SECRET_SETTING.search(name) and value}
    return own | _secrets_in(Address(str(settings.get("url", ""))))


def _reason(error: BaseException, secrets: set[str]) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _one_line(error, secrets)


def _one_line(error: BaseException, secrets: set[str]) -> str:
    """What an error says, without credentials."""
    text = hidden(" ".join(str(error).split()))
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text[:_REASON_CHARACTERS] or type(error).__name__
