"""DVC: pull a prepared folder at one revision of a git repository, and say what DVC knows about a folder.

A revision is resolved to a commit, and what arrives is compared with its own manifests before it is handed
over, so a stage that names (repository, commit, path) always works on the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitpipe.config.data import SHARD_SETS, PinnedConfig
from vitpipe.config.digest import digest_of, file_digest
from vitpipe.contracts.address import hidden
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.contracts.files import move_aside
from vitpipe.data.manifest import (
    MANIFEST,
    DataManifest,
    DenseManifest,
    ShardManifest,
    content_digest,
    read_manifest,
)
from vitpipe.data.shards import open_shards, verify_checksums
from vitpipe.prepare.dvc_errors import HOW_TO_SIGN_IN, dvc_errors

_ASIDE = ".pulled"
_GIT_SECONDS = 20


@dataclass(frozen=True)
class Revision:
    """Which version of which tracked folder.

    Attributes:
        repo: address or folder of the git repository, without credentials.
        commit: the commit that the revision named when it was pulled.
        path: the folder inside the repository.
        dvc_md5: DVC's own digest of the folder, `<md5>.dir`; empty below a tracked folder.
        remote: name of the DVC remote that has the files.
    """

    repo: str
    commit: str
    path: str
    dvc_md5: str
    remote: str

    def as_dict(self) -> dict[str, str]:
        """The same with the keys of `dvc_revision`, for tables, tags and cards."""
        return {
            "dvc_repo": self.repo,
            "dvc_commit": self.commit,
            "dvc_path": self.path,
            "dvc_md5": self.dvc_md5,
            "dvc_remote": self.remote,
        }


def pull(config: PinnedConfig, out: Path) -> Revision:
    """Fetch a prepared folder as it was at one revision and put its content into `out`.

    Nothing lies in `out` before all of it has been compared with its manifests. Shards that are kept in
    object storage stay there; only their sizes are compared.

    Args:
        out: made if need be; files and datasets of the same names are replaced, a folder that is no dataset
            is moved beside `out`.

    Raises:
        DatasetError: when the repository cannot be opened, has no such revision, remote or tracked path,
            when the remote has not got the files, or when they are not what their manifests or
            `config.digest` say.
        StorageError: when the remote does not answer or refuses, or the disk refuses a write.
    """
    aside = out / _ASIDE
    with disk_errors(out):
        shutil.rmtree(aside, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        try:
            revision = _fetch(config, aside)
            _check(aside, config)
            for entry in sorted(aside.iterdir()):
                target = out / entry.name
                if target.is_dir() and not (target / MANIFEST).is_file() and any(target.iterdir()):
                    kept = move_aside(target, "no-dataset-of-vitpipe")
                    kept.rename(out.parent / f"{out.name}.{kept.name}")
                if target.is_dir():
                    shutil.rmtree(target)
                entry.replace(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return revision


def dvc_revision(folder: Path) -> dict[str, str]:
    """What DVC knows about a folder, read from `dvc.lock` or a `.dvc` file; empty when it is not tracked.

    Returns:
        `dvc_md5`, `dvc_path` (of the tracked folder, from the root of the repository), `dvc_file` (the file
        that says so) and, in a git repository, `dvc_commit` (with `+changes` when that file differs from it).
        Empty, too, when `dvc.lock` is about another number of files or bytes than lie there now.
    """
    folder = folder.resolve()
    for place in (folder.parent, *folder.parent.parents):
        for file, out in _tracked(place):
            tracked = (place / out.get("wdir", ".") / str(out.get("path", ""))).resolve()
            md5 = out.get("md5")
            if (
                md5
                and folder.is_relative_to(tracked)
                and (file.suffix == ".dvc" or _is_current(tracked, out))
            ):
                root = _dvc_root(place)
                return {
                    "dvc_md5": str(md5),
                    "dvc_path": tracked.relative_to(root).as_posix(),
                    "dvc_file": file.relative_to(root).as_posix(),
                    **_commit_of(file),
                }
        if (place / ".dvc").is_dir():
            break
    return {}


# --- pulling -------------------------------------------------------------------------------------------


def _fetch(config: PinnedConfig, out: Path) -> Revision:
    """Download by DVC's own interface. Raises as `pull`."""
    from dvc.repo import Repo
    from dvc.repo.open_repo import clean_repos

    if "***" in config.repo.secret:
        raise DatasetError(
            "The credentials of the repository are missing: its address is from a record, where *** stands "
            "for them",
            where=str(config.repo),
            fix=HOW_TO_SIGN_IN,
        )
    # Nobody may be at the keyboard; and the question would show a token that stands in the user's place.
    os.environ.setdefault("GIT_TERMINAL_PROMPT", "0")
    try:
        with dvc_errors(config):
            repo = Repo.open(
                url=config.repo.secret,
                rev=config.revision,
                subrepos=True,
                uninitialized=True,  # DVC may live in a folder of the repository
                remote=config.remote,
                config=_remote_of_folder(config),
            )
        with repo:
            with dvc_errors(config):
                commit, remote = repo.get_rev(), repo.config["core"].get("remote") or ""
                md5 = _md5_of(repo, config)
            with dvc_errors(config, remote, repo.config["remote"].get(remote, {})):
                repo.dvcfs.get(config.path.rstrip("/"), str(out))
    finally:
        clean_repos()
    return Revision(str(config.repo), commit, config.path, md5, hidden(remote))


def _remote_of_folder(config: PinnedConfig) -> dict[str, Any]:
    """A named remote as the repository's own folder has it: at a revision, relative paths lead nowhere."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    if config.remote is None or not Path(config.repo.secret).is_dir():
        return {}
    try:
        with Repo(config.repo.secret, uninitialized=True) as repo:
            known = repo.config["remote"].get(config.remote)
    except NotDvcRepoError:
        return {}
    return {"remote": {config.remote: known}} if known else {}


def _md5_of(repo: Any, config: PinnedConfig) -> str:
    """DVC's digest of the path at the revision; it must be a tracked folder."""
    try:
        info = repo.dvcfs.info(config.path)
    except FileNotFoundError:
        info = {}
    tracked = info.get("dvc_info") or {}
    if not tracked.get("isout") or info.get("type") != "directory":
        raise DatasetError(
            f"DVC tracks no folder '{config.path}' at revision {config.revision}",
            where=str(config.repo),
            fix="correct data.pinned.path, or pin a revision whose dvc.lock names it; `dvc list` shows them",
        )
    return str(tracked.get("md5") or "")


def _check(folder: Path, config: PinnedConfig) -> None:
    """Compare everything that was pulled with its manifests."""
    whole = read_manifest(folder, DataManifest)
    for name, digest in whole.sets.items():
        own = _check_shards(folder, name) if name in SHARD_SETS else _check_dense(folder / name)
        if own != digest:
            raise _differs(config, f"the set '{name}' has digest {own[:12]} instead of {digest[:12]}")
    if digest_of(whole.sets) != whole.data_digest:
        raise _differs(config, "the digest of the whole is not that of its sets")
    if config.digest not in (None, whole.data_digest):
        raise DatasetError(
            f"The data pulled has digest {whole.data_digest}, but {config.digest} is asked for",
            where=f"{config.path} at revision {config.revision}",
            fix="correct data.pinned.digest, or pin the revision that has this digest",
        )


def _check_shards(folder: Path, name: str) -> str:
    manifest = read_manifest(folder / name, ShardManifest)
    if manifest.store is None:
        verify_checksums(folder, name)
    else:
        for split in manifest.splits:
            open_shards(folder, name, split).close()
    return content_digest(manifest)


def _check_dense(folder: Path) -> str:
    manifest = read_manifest(folder, DenseManifest)
    if manifest.archive is not None:
        archive = folder / manifest.archive
        if not archive.is_file() or file_digest(archive) != manifest.archive_sha256:
            raise DatasetError(
                "The archive's checksum is not that of the manifest",
                where=archive,
                fix="run `dvc push` again where the data was made",
            )
    return content_digest(manifest)


def _differs(config: PinnedConfig, reason: str) -> DatasetError:
    return DatasetError(
        f"The data pulled is not what its manifests say: {reason}",
        where=f"{config.path} at revision {config.revision}",
        fix="pin another revision; this one was changed by hand or made by another version",
    )


# --- what DVC knows -------------------------------------------------------------------------------------


def _tracked(place: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Outputs that the DVC files of one folder name, with the file."""
    for file in (place / "dvc.lock", *sorted(place.glob("*.dvc"))):
        if not file.is_file():
            continue
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # DVC itself will tell
        if not isinstance(content, dict):
            continue
        stages = content.get("stages", {}).values() if file.suffix == ".lock" else (content,)
        for stage in stages:
            for out in stage.get("outs") or ():
                yield file, {**out, "wdir": stage.get("wdir", ".")}


def _is_current(folder: Path, out: dict[str, Any]) -> bool:
    """Does the folder hold as many files and bytes as DVC noted?"""
    if "nfiles" not in out or not folder.is_dir():
        return folder.exists()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return (len(sizes), sum(sizes)) == (out["nfiles"], out.get("size"))


def _dvc_root(place: Path) -> Path:
    return next((parent for parent in (place, *place.parents) if (parent / ".dvc").is_dir()), place)


def _commit_of(file: Path) -> dict[str, str]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return {
            "dvc_commit": f"{commit}+changes" if git("status", "--porcelain", "--", file.name) else commit
        }
    except (OSError, subprocess.SubprocessError):
        return {}
