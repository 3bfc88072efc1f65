"""Files that installed packages carry, found without importing the package and without any download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from vitpipe.contracts.errors import DatasetError


def bundled_file(package: str, relative: str) -> Path:
    """The path of a file inside an installed top-level package.

    Importing scikit-learn takes seconds, reading one file of it does not.

    Raises:
        DatasetError: when the package is absent or comes without the file.
    """
    spec = find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else Path(package)
    path = folder / relative
    if not path.is_file():
        raise DatasetError(
            f"The installed '{package}' comes without a file that is needed here",
            where=path,
            fix="install the version of requirements.lock, from a wheel",
        )
    return path
