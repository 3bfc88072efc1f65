"""A small checkout for `environment/install.py`: our scripts, the real uv, packages in a folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
# Builds an editable installation without fetching anything; sleeps or fails when the environment says so.
BACKEND = """\
import os, sys, time, zipfile
from pathlib import Path

def build_editable(folder, settings=None, metadata=None):
    if os.environ.get("FAIL_BUILD"):
        sys.exit("the build was told to fail")
    Path("building").write_text("")
    time.sleep(float(os.environ.get("BUILD_SECONDS", "0")))
    name = "vitpipe-0-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder) / name, "w") as wheel:
        wheel.writestr("vitpipe.pth", str(Path.cwd()))
        wheel.writestr("vitpipe-0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: vitpipe\\nVersion: 0\\n")
        wheel.writestr("vitpipe-0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("vitpipe-0.dist-info/entry_points.txt", "[console_scripts]\\nvitpipe = vitpipe.cli:main\\n")
        wheel.writestr("vitpipe-0.dist-info/RECORD", "")
    return name
"""
TRIAL = "import torch; print(torch.__version__)"
PROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "vitpipe"
version = "0"
"""


def wheel(index: Path, name: str, version: str = "1.0", **files: str) -> str:
    """Write a wheel into a package index of folders; its line in a lock."""
    folder = index / name.replace("_", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    content = {
        f"{name}.py": f"__version__ = '{version}'\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **files,
    }
    record = "".join(f"{file},,\n" for file in [*content, f"{about}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**content, f"{about}/RECORD": record}.items():
            archive.writestr(file, text)
    links = "".join(f'<a href="{file.name}">{file.name}</a>' for file in folder.glob("*.whl"))
    (folder / "index.html").write_text(links)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name.replace('_', '-')}=={version} \\\n    --hash=sha256:{digest}\n"


class Checkout:
    """A folder with our scripts, a lock of small packages, and a package of the name vitpipe."""

    def __init__(self, root: Path) -> None:
        self.root, self.venv, self.index = root, root / ".venv", root / "index"
        root.mkdir()
        shutil.copy(ROOT / "Makefile", root)
        shutil.copytree(
            ROOT / "environment", root / "environment", ignore=shutil.ignore_patterns("__pycache__")
        )
        script = root / "environment" / "install.py"
        # What a chain imports is not there.
        trials = f"TRIALS = ({TRIAL!r}, 'import torchvision')\n"
        text = re.sub(r"^TRIALS = \($.*?^\)$", trials, script.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert trials in text
        script.write_text(text)
        (root / "backend.py").write_text(BACKEND)
        (root / "pyproject.toml").write_text(PROJECT)
        (root / "vitpipe").mkdir()
        (root / "vitpipe" / "cli.py").write_text("def main(): print('the verb')\n")
        names = ("torch", "torchvision", "triton", "nvidia_cudnn", "dummy")
        self.lines = {name: wheel(self.index, name) for name in names}
        self.lines["uv"] = "uv==0.0.1 \\\n    --hash=sha256:" + "0" * 64 + "\n"
        self.write_lock(*names)

    def write_lock(self, *names: str) -> None:
        self.names = names
        # uv itself is never installed here: the one on the path is newer than the lock's.
        marker = self.lines["uv"].replace(" \\", " ; sys_platform == 'nowhere' \\", 1)
        (self.root / "requirements.lock").write_text(marker + "".join(self.lines[name] for name in names))

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        own = {"UV_CACHE_DIR": str(self.root / "cache"), "UV_DEFAULT_INDEX": self.index.as_uri()}
        return {**kept, "PATH": f"{UV.parent}:/usr/bin:/bin", **own, **variables}

    def install(self, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.root / "environment" / "install.py"), *options]
        return subprocess.run(
            command, cwd=self.root, env=self.environment(**variables), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip

    def packages(self) -> set[str]:
        return {p.name.partition("-")[0] for p in self.venv.glob("lib/python3.*/site-packages/*.dist-info")}

    def runs(self) -> str:
        return subprocess.run(
            [self.venv / "bin" / "vitpipe"], capture_output=True, text=True, check=True
        ).stdout

    def leftovers(self) -> list[str]:
        return sorted(p.name for p in self.root.glob(".venv*"))

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *arguments], cwd=self.root, env=self.environment(**variables), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
