"""Data files inside installed packages, found without importing the package and without a download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from vitpipe.contracts.errors import DatasetError


def bundled_file(package: str, relative: str) -> Path:
    """The path of a file inside an installed top-level package.

    Raises:
        DatasetError: when the package is absent or comes without the file.
    """
    # Not `importlib.resources`, which imports the package: importing scikit-learn takes seconds.
    # `find_spec` of a top-level name imports nothing.
    spec = find_spec(package)
    # An absent package gives a relative path that does not exist, and so the same error.
    folder = Path(spec.origin).parent if spec and spec.origin else Path(package)
    path = folder / relative
    if not path.is_file():
        raise DatasetError(
            f"The installed package '{package}' lacks a data file",
            where=path,
            fix="install the version of requirements.lock, from a wheel",
        )
    return path
