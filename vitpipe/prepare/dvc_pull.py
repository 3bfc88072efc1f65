"""DVC: download a prepared folder at one revision of a git repository, and read the DVC revision of a folder.

A revision is resolved to a commit, and the download is verified against its own manifests before it appears
in the output folder, so (repository, commit, path) always gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from vitpipe.config.data import PinnedConfig
from vitpipe.config.digest import digest_of, file_digest
from vitpipe.contracts.address import Address, hidden
from vitpipe.contracts.errors import DatasetError, disk_errors
from vitpipe.contracts.files import move_aside
from vitpipe.contracts.git import ask_git
from vitpipe.contracts.provenance import UNTRACKED
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
from vitpipe.prepare.set_summary import read_set

# The same name in every attempt, so that the next one removes what a killed one left.
_PARTIAL = ".pulled"
# Local git commands answer in well under a second; a network file system may hang for ever.
_GIT_SECONDS = 20


@dataclass(frozen=True)
class Revision:
    """One version of a folder that DVC tracks.

    Attributes:
        repo: URL or folder of the git repository, without credentials.
        commit: the commit that the revision resolved to when it was pulled.
        path: the folder inside the repository.
        dvc_md5: DVC's own digest of the folder, `<md5>.dir`; empty for a folder inside a tracked folder.
        remote: name of the DVC remote that the files came from.
    """

    repo: str
    commit: str
    path: str
    dvc_md5: str
    remote: str

    def as_dict(self) -> dict[str, str]:
        """The attributes under the keys of `dvc_revision`, for tables, tags and cards."""
        return {
            "dvc_repo": self.repo,
            "dvc_commit": self.commit,
            "dvc_path": self.path,
            "dvc_md5": self.dvc_md5,
            "dvc_remote": self.remote,
        }


def pull(config: PinnedConfig, out: Path) -> Revision:
    """Download a prepared folder as it was at one revision into `out`.

    Nothing appears in `out` before all of it has been verified against its manifests. Shards in object
    storage stay there; only their sizes are compared.

    Args:
        out: created if needed. Files and datasets of the same names are replaced; a folder that is not a
            dataset of vitpipe is moved next to `out`.

    Raises:
        DatasetError: if the repository cannot be opened, has no such revision, remote or tracked path, if
            files are missing in the remote, or if they do not match their manifests or `config.digest`.
        StorageError: if the remote does not answer or refuses, or a write to the disk fails.
    """
    partial = out / _PARTIAL
    with disk_errors(out):
        shutil.rmtree(partial, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        try:
            revision = _download(config, partial)
            _verify(partial, config)
            for entry in sorted(partial.iterdir()):
                target = out / entry.name
                if target.is_dir() and not (target / MANIFEST).is_file() and any(target.iterdir()):
                    kept = move_aside(target, "no-dataset-of-vitpipe")
                    # Out of the prepared folder, which DVC tracks as a whole and later stages read.
                    kept.rename(out.parent / f"{out.name}.{kept.name}")
                if target.is_dir():
                    shutil.rmtree(target)  # os.rename replaces a file, but not a folder with content
                entry.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return revision


def dvc_revision(folder: Path) -> dict[str, str]:
    """The DVC revision of a folder, read from `dvc.lock` or a `.dvc` file; empty if DVC does not track it.

    Returns:
        `dvc_md5`, `dvc_path` (the tracked folder, relative to the DVC root), `dvc_file` (where it is
        recorded) and, in a git repository, `dvc_commit` (with `+changes` if that file has uncommitted
        changes). Also empty if `dvc.lock` records another number of files or bytes than the folder has.
    """
    # Parsed without DVC: every stage calls this, and DVC takes about two seconds to import.
    folder = folder.resolve()
    for place in (folder.parent, *folder.parent.parents):
        for file, out in _tracked(place):
            tracked = (place / out.get("wdir", ".") / str(out.get("path", ""))).resolve()
            md5 = out.get("md5")
            # dvc.lock still has the previous output while `dvc repro` runs the stage again.
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


# --- download ------------------------------------------------------------------------------------------


def _download(config: PinnedConfig, out: Path) -> Revision:
    """Download by `dvc.api.DVCFileSystem`. Raises as `pull`."""
    # Imported here: DVC takes about two seconds to import, and only pinned data needs it.
    from dvc.api import DVCFileSystem
    from dvc.repo.open_repo import clean_repos

    if "***" in config.repo.secret:
        raise DatasetError(
            "The credentials of the repository are missing: its URL was copied from a record, which has *** "
            "in their place",
            where=str(config.repo),
            fix=HOW_TO_SIGN_IN,
        )
    # No prompt in a pipeline; it would also show the user name, which for https is often a token.
    os.environ.setdefault("GIT_TERMINAL_PROMPT", "0")
    with ExitStack() as stack:
        stack.callback(clean_repos)  # only DVC's command line removes its temporary clones, not the API
        with dvc_errors(config):
            source = DVCFileSystem(
                stack.enter_context(_credentials_in_memory(config.repo)),
                rev=config.revision,
                subrepos=True,  # the DVC project may be in a subfolder of the git repository
                remote=config.remote,
                config=_remote_of_folder(config),
            )
            stack.callback(source.close)
            # The repository is cloned by the first access to `repo`.
            commit, remote = source.repo.get_rev(), source.repo.config["core"].get("remote") or ""
            md5 = _md5_of(source, config)
        with dvc_errors(config, remote, source.repo.config["remote"].get(remote, {})):
            source.get(config.path.rstrip("/"), str(out), recursive=True)
    return Revision(str(config.repo), commit, config.path, md5, hidden(remote))


@contextmanager
def _credentials_in_memory(repo: Address) -> Iterator[str]:
    """The URL without user and password; scmrepo gives them to the server from its memory.

    DVC (3.67) writes the URL that it clones into the `.git/config` of a temporary folder, which stays after
    `kill -9`. GIT_CONFIG_COUNT would not do: dulwich reads it when cloning, but not for credential helpers.
    """
    from scmrepo.git.credentials import Credential, memory_helper

    parts = urlsplit(repo.secret)
    userinfo, at, host = parts.netloc.rpartition("@")
    if not at or parts.scheme not in ("http", "https"):  # scmrepo asks its memory for http only
        yield repo.secret
        return
    user, _, password = userinfo.partition(":")
    url = parts._replace(netloc=host).geturl()
    credential = Credential(url=url, username=unquote(user), password=unquote(password))
    # The lookup tries (protocol, host, path), where a slash more would matter, then (protocol, host).
    credential.path = None
    # Approval after a successful request writes to the user's helpers, for example ~/.git-credentials.
    credential._approved = True
    memory_helper.store(credential)
    try:
        yield url
    finally:
        memory_helper.erase(credential)


def _remote_of_folder(config: PinnedConfig) -> dict[str, Any]:
    """The settings of a named remote, read from the work tree of a repository on this disk.

    DVC does this for the default remote only; it would resolve the relative path of any other remote inside
    git's tree, whose root is `/`.
    """
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


def _md5_of(source: Any, config: PinnedConfig) -> str:
    """DVC's digest of the path at the revision.

    Raises:
        DatasetError: if DVC does not track the path, or it is not a folder.
    """
    try:
        info = source.info(config.path)
    except FileNotFoundError:
        info = {}
    tracked = info.get("dvc_info") or {}
    if not tracked.get("isout") or info.get("type") != "directory":
        raise DatasetError(
            f"DVC tracks no folder '{config.path}' at revision {config.revision}",
            where=str(config.repo),
            fix="correct data.pinned.path (`dvc list -R --dvc-only REPO --rev REVISION` lists the tracked "
            "paths), or pin a revision whose dvc.lock contains it",
        )
    return str(tracked.get("md5") or "")


def _verify(folder: Path, config: PinnedConfig) -> None:
    """Verify the download against its manifests.

    DVC's checksums do not cover a folder whose files were edited before `dvc push`, and by default it does
    not verify what it downloads (remote setting `verify`).
    """
    whole = read_manifest(folder, DataManifest)
    for name, digest in whole.sets.items():
        manifest = read_set(folder, name)
        is_dense = isinstance(manifest, DenseManifest)
        own = _verify_dense(folder / name) if is_dense else _verify_shards(folder, name)
        if own != digest:
            raise _mismatch(config, f"set '{name}' has digest {own[:12]}, expected {digest[:12]}")
    if digest_of(whole.sets) != whole.data_digest:
        raise _mismatch(config, "data_digest is not the digest of the sets")
    if config.digest not in (None, whole.data_digest):
        raise DatasetError(
            f"The pulled data has digest {whole.data_digest}, but data.pinned.digest is {config.digest}",
            where=f"{config.path} at revision {config.revision}",
            fix="correct data.pinned.digest, or pin the revision that has this digest",
        )


def _verify_shards(folder: Path, name: str) -> str:
    manifest = read_manifest(folder / name, ShardManifest)
    if manifest.store is None:
        verify_checksums(folder, name)
    else:
        # Opening compares the sizes in the store; reading every byte back would cost a full download.
        for split in manifest.splits:
            open_shards(folder, name, split).close()
    return content_digest(manifest)


def _verify_dense(folder: Path) -> str:
    manifest = read_manifest(folder, DenseManifest)
    if manifest.archive is not None:
        archive = folder / manifest.archive
        if not archive.is_file() or file_digest(archive) != manifest.archive_sha256:
            raise DatasetError(
                "The archive is missing, or its checksum is not the one in the manifest",
                where=archive,
                fix="run `dvc repro --force prepare` and `dvc push` where the data was prepared",
            )
    return content_digest(manifest)


def _mismatch(config: PinnedConfig, reason: str) -> DatasetError:
    return DatasetError(
        f"The pulled data does not match its manifests: {reason}",
        where=f"{config.path} at revision {config.revision}",
        fix="pin another revision; this one was edited by hand, or written by another version of vitpipe",
    )


# --- DVC revision of a folder --------------------------------------------------------------------------


def _tracked(place: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Outputs recorded in the DVC files of one folder, each with its file."""
    for file in (place / "dvc.lock", *sorted(place.glob("*.dvc"))):
        if not file.is_file():
            continue
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # provenance is optional here; DVC reports a broken file when it is used
        if not isinstance(content, dict):
            continue
        # DVC's file formats: dvc.lock has `stages.<name>.outs`, a .dvc file has `outs` at the top level, with
        # paths relative to its `wdir`.
        stages = content.get("stages", {}).values() if file.suffix == ".lock" else (content,)
        for stage in stages:
            for out in stage.get("outs") or ():
                yield file, {**out, "wdir": stage.get("wdir", ".")}


def _is_current(folder: Path, out: dict[str, Any]) -> bool:
    """Whether the folder has the number of files and bytes that DVC recorded."""
    # Single files have no `nfiles`.
    if "nfiles" not in out or not folder.is_dir():
        return folder.exists()
    sizes = [
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name not in UNTRACKED
    ]
    return (len(sizes), sum(sizes)) == (out["nfiles"], out.get("size"))


def _dvc_root(place: Path) -> Path:
    return next((parent for parent in (place, *place.parents) if (parent / ".dvc").is_dir()), place)


def _commit_of(file: Path) -> dict[str, str]:
    try:
        commit = ask_git(file.parent, "rev-parse", "HEAD", seconds=_GIT_SECONDS)
        changed = ask_git(file.parent, "status", "--porcelain", "--", file.name, seconds=_GIT_SECONDS)
        return {"dvc_commit": f"{commit}+changes" if changed else commit}
    except (OSError, subprocess.SubprocessError):
        return {}
