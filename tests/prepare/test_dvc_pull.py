"""Prepared folders under DVC: push, pull, pinned revisions, and the errors when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from dvc.repo import open_repo
from git_server import GitServer
from s3_server import s3, s3_gate, s3_port  # noqa: F401
from tiny_shards import send, write_set

from vitpipe.config.data import PinnedConfig
from vitpipe.config.digest import digest_of, file_digest
from vitpipe.contracts.address import Address
from vitpipe.contracts.errors import DatasetError, StorageError, VitpipeError
from vitpipe.data.manifest import DataManifest, DenseManifest, content_digest, read_digest, write_manifest
from vitpipe.data.shards import open_shards
from vitpipe.prepare.dvc_errors import dvc_errors
from vitpipe.prepare.dvc_pull import dvc_revision, pull

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
PREPARED = "artifacts/demo/prepare"
DVC_YAML = f"""
stages:
  prepare:
    cmd: mkdir -p artifacts/demo && cp -r $(cat source.txt) {PREPARED}
    deps: [source.txt]
    outs: [{PREPARED}]
"""


@pytest.fixture(autouse=True, scope="module")
def _own_site_cache(tmp_path_factory):
    """DVC keeps a database per repository outside of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.mktemp("site")))
        yield


def run(folder: Path, *command: str) -> str:
    environment = {
        **os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def new_repo(folder: Path, remote: str, **settings: str) -> Path:
    folder.mkdir(parents=True)
    run(folder, "git", "init", "--quiet", "--initial-branch=main")
    run(folder, "dvc", "init", "--quiet")
    run(folder, "dvc", "remote", "add", "--quiet", "--default", "storage", remote)
    for name, value in settings.items():
        run(folder, "dvc", "remote", "modify", "storage", name, value)
    (folder / "dvc.yaml").write_text(DVC_YAML, encoding="utf-8")
    (folder / ".gitignore").write_text("/artifacts/\n", encoding="utf-8")
    return folder


def new_version(repo: Path, source: Path, *, push: bool = True) -> str:
    """Run the chain on another prepared folder, commit it; returns the commit."""
    (repo / "source.txt").write_text(str(source), encoding="utf-8")
    run(repo, "dvc", "repro", "--quiet")
    run(repo, "git", "add", "--all")
    run(repo, "git", "commit", "--quiet", "--message", source.name)
    if push:
        run(repo, "dvc", "push", "--quiet")
    return run(repo, "git", "rev-parse", "HEAD")


def add_dense(prepared: Path) -> None:
    """A dense set of one archive beside the shards."""
    (prepared / "coco").mkdir()
    (prepared / "coco" / "coco.tar").write_bytes(b"not looked into")
    sha256 = file_digest(prepared / "coco" / "coco.tar")
    coco = DenseManifest(
        dataset="coco", classes=("cat",), counts={"train_images": 1}, archive="coco.tar", archive_sha256=sha256,
        size_bytes=15, digest="",
    )  # fmt: skip
    coco = coco.model_copy(update={"digest": content_digest(coco)})
    write_manifest(prepared / "coco", coco)
    sets = {"coco": coco.digest, "imagenet": write_set(prepared).digest}
    write_manifest(prepared, DataManifest(source="folders", sets=sets, data_digest=digest_of(sets)))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A repository with three versions, the last one not pushed; `clone` has no cache of its own."""
    place = tmp_path_factory.mktemp("dvc")
    for number in (1, 2, 3):
        write_set(place / f"v{number}", seed=number, num_images=6)
    add_dense(place / "v1")
    repo = new_repo(place / "repo", "../storage")
    run(repo, "dvc", "remote", "add", "--quiet", "elsewhere", "../elsewhere")
    (place / "commit1").write_text(new_version(repo, place / "v1"))
    run(repo, "git", "tag", "--annotate", "first", "--message", "first")
    (place / "commit2").write_text(new_version(repo, place / "v2"))
    run(place, "git", "clone", "--quiet", "repo", "clone")
    new_version(repo, place / "v3", push=False)
    run(place / "clone", "git", "pull", "--quiet")
    return place


def pinned(place, **values) -> PinnedConfig:
    given = {"repo": str(place / "clone"), "revision": "first", "path": PREPARED, **values}
    return PinnedConfig(**given)


def test_push_clone_pull(place, tmp_path):
    run(tmp_path, "git", "clone", "--quiet", str(place / "repo"), "fresh")
    run(tmp_path / "fresh", "git", "checkout", "--quiet", (place / "commit2").read_text())
    run(tmp_path / "fresh", "dvc", "remote", "modify", "--local", "storage", "url", str(place / "storage"))
    run(tmp_path / "fresh", "dvc", "pull", "--quiet")
    pulled = tmp_path / "fresh" / PREPARED
    assert content(pulled) == content(place / "v2")
    ours, theirs = open_shards(pulled, "imagenet", "val"), open_shards(place / "v2", "imagenet", "val")
    assert ours.read_many(range(6)) == theirs.read_many(range(6))


def test_an_old_revision_after_the_data_has_moved_on(place, tmp_path):
    commit = (place / "commit1").read_text()
    (tmp_path / "out" / "imagenet").mkdir(parents=True)
    (tmp_path / "out" / "imagenet" / "stale").touch()
    lock = yaml.safe_load(run(place / "repo", "git", "show", f"{commit}:dvc.lock"))
    for number, revision in enumerate(("first", commit)):
        config = pinned(place, revision=revision, digest=read_digest(place / "v1"))
        found = pull(config, tmp_path / "out")
        assert content(tmp_path / "out") == content(place / "v1"), number
        assert (found.commit, found.path, found.remote) == (commit, PREPARED, "storage")
        assert found.dvc_md5 == lock["stages"]["prepare"]["outs"][0]["md5"]
        assert found.as_dict()["dvc_repo"] == str(place / "clone")
    (kept,) = tmp_path.glob("out.imagenet.aside-*-no-dataset-of-vitpipe")
    assert [path.name for path in kept.iterdir()] == ["stale"]


def test_by_address_with_another_remote(place, tmp_path):
    """The clone that DVC makes for an address has nothing but git and the remote."""
    shutil.copytree(place / "storage", place / "elsewhere")
    try:
        found = pull(
            pinned(place, remote="elsewhere", revision=(place / "commit2").read_text()), tmp_path / "out"
        )
    finally:
        shutil.rmtree(place / "elsewhere")
    assert content(tmp_path / "out") == content(place / "v2")
    assert found.remote == "elsewhere"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"revision": "nope"}, r"no revision 'nope'.*data\.pinned\.revision"),
        ({"path": "artifacts/nothing"}, r"tracks no folder 'artifacts/nothing' at revision first.*data\.pinned\.path"),
        ({"path": "dvc.yaml"}, r"tracks no folder 'dvc\.yaml'"),
        ({"path": f"{PREPARED}/manifest.json"}, r"tracks no folder"),
        ({"revision": "main"}, rf"Files of '{PREPARED}' at revision main are missing.*storage.*dvc push"),
        ({"remote": "elsewhere"}, r"are missing in the DVC remote.*elsewhere"),
        ({"repo": "https://***@host/x.git"}, r"credentials of the repository are missing.*GIT_CONFIG_GLOBAL"),
        ({"repo": "https://me:***@host/x.git"}, r"credentials of the repository are missing.*GIT_CONFIG_GLOBAL"),
        ({"remote": "absent"}, r"no such DVC remote.*absent.*data\.pinned\.remote"),
        ({"repo": "/nowhere/at/all"}, r"cannot be opened.*data\.pinned\.repo"),
        ({"repo": "https://user:secret@127.0.0.1:9/x.git"}, r"cannot be opened.*Where: https://user:\*\*\*@127\.0\.0\.1:9/x\.git"),
        ({"digest": "0" * 64}, r"data\.pinned\.digest is 0000.*correct data\.pinned\.digest"),
    ],
    ids=lambda value: next(iter(value.values()))[:20] if isinstance(value, dict) else "",
)  # fmt: skip
def test_error_messages(place, tmp_path, values, words):
    with pytest.raises(DatasetError, match=words) as caught:
        pull(pinned(place, **values), tmp_path / "out")
    assert "secret" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_does_not_match_its_manifests(place, tmp_path):
    repo = new_repo(tmp_path / "repo", str(tmp_path / "storage"))
    for number, name in enumerate(
        ("imagenet/val-000000.tar", "coco/coco.tar", "imagenet/manifest.json", "manifest.json")
    ):
        bad = Path(shutil.copytree(place / "v1", tmp_path / f"bad{number}"))
        intact = (bad / name).read_bytes()
        edited = intact.replace(b'"n1"', b'"n9"').replace(b'"data_digest": "', b'"data_digest": "0')
        (bad / name).write_bytes(edited if name.endswith(".json") else b"x" + intact[1:])
        new_version(repo, bad, push=False)
        with pytest.raises(DatasetError, match=r"[Cc]hecksum|does not match its manifests"):
            pull(pinned(place, repo=str(repo), revision="main"), tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []


def test_a_remote_in_object_storage(s3, tmp_path, monkeypatch):  # noqa: F811
    """Push and pull by S3; then pinned, with the shards themselves in a store; then without the server."""
    manifest = write_set(tmp_path / "v1", num_images=6)
    repo = new_repo(tmp_path / "repo", "s3://shards/dvc", endpointurl=s3.address)
    commit = new_version(repo, tmp_path / "v1")
    run(tmp_path, "git", "clone", "--quiet", "repo", "clone")
    run(tmp_path / "clone", "dvc", "pull", "--quiet")
    assert content(tmp_path / "clone" / PREPARED) == content(tmp_path / "v1")
    shutil.rmtree(tmp_path / "clone" / ".dvc" / "cache")

    write_set(tmp_path / "v2", num_images=6, store="s3://shards/sets/imagenet")
    send(tmp_path / "v2" / "imagenet", manifest.model_copy(update={"store": "s3://shards/sets/imagenet"}))
    for file in (tmp_path / "v2" / "imagenet").glob("*-*.tar"):
        file.unlink()
    new_version(repo, tmp_path / "v2")
    run(tmp_path / "clone", "git", "pull", "--quiet")
    config = PinnedConfig(repo=str(tmp_path / "clone"), revision=commit, path=PREPARED)
    assert pull(config, tmp_path / "out").commit == commit
    assert content(tmp_path / "out") == content(tmp_path / "v1")
    by_address = config.model_copy(
        update={"repo": Address(f"file://me:secret@{tmp_path / 'clone'}"), "revision": "main"}
    )
    assert pull(by_address, tmp_path / "out2").repo == f"file://me:***@{tmp_path / 'clone'}"
    assert content(tmp_path / "out2") == content(tmp_path / "v2")
    theirs = open_shards(tmp_path / "v1", "imagenet", "train").read_many(range(6))
    assert open_shards(tmp_path / "out2", "imagenet", "train").read_many(range(6)) == theirs

    run(
        tmp_path / "clone",
        "dvc",
        "remote",
        "modify",
        "--local",
        "storage",
        "endpointurl",
        "http://127.0.0.1:9",
    )
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # else botocore waits a quarter of a minute
    with pytest.raises(StorageError, match=r"DVC remote cannot be read.*127\.0\.0\.1:9.*s3://shards/dvc"):
        pull(config, tmp_path / "out3")
    run(tmp_path / "clone", "dvc", "remote", "modify", "--local", "storage", "endpointurl", s3.address)
    run(tmp_path / "clone", "dvc", "remote", "modify", "--local", "storage", "url", "s3://absent/dvc")
    with pytest.raises(VitpipeError, match=r"s3://absent/dvc"):
        pull(config, tmp_path / "out3")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match=r"cannot be read.*[Cc]redentials"):
        pull(config, tmp_path / "out3")


def test_a_repository_that_requires_credentials(place, tmp_path, monkeypatch):
    """The password is in the URL or in a credential helper; neither records nor temporary files hold it."""
    password = "p:a/s'w%"
    with GitServer(place, "me", password) as server:
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
        quoted = quote(password, safe="")
        signed_in = f"http://me:{quoted}@{server.host}/repo"
        common = {"remote": "elsewhere", "revision": (place / "commit2").read_text()}

        def download(source, path, out, recursive):
            """In place of the remote, which the server does not serve; looks into DVC's temporary clones."""
            assert open_repo.CLONES
            for clone, _ in open_repo.CLONES.values():
                files = [path for path in Path(clone).rglob("*") if path.is_file()]
                texts = [path.read_text("latin-1") for path in files]
                assert any(server.host in text for text in texts)
                assert not any(word in text for word in (password, quoted) for text in texts)
            shutil.copytree(place / "v2", out)

        with monkeypatch.context() as patch:
            patch.setattr("dvc.api.DVCFileSystem.get", download)
            found = pull(pinned(place, repo=signed_in, **common), tmp_path / "out")
            assert found.repo == f"http://me:***@{server.host}/repo"
            with pytest.raises(DatasetError, match=r"cannot be opened.*credential helper"):
                pull(pinned(place, repo=f"http://{server.host}/repo", **common), tmp_path / "out")
            wrong = f"http://hunter2token@{server.host}/repo"
            with pytest.raises(DatasetError, match="cannot be opened") as caught:
                pull(pinned(place, repo=wrong, **common), tmp_path / "out")
            assert "hunter2token" not in str(caught.value)
            # Git would write a password from the URL into the user's own helper; here it stays in memory.
            helper = f"[credential]\n\thelper = store --file {tmp_path}/credentials\n"
            (tmp_path / "gitconfig").write_text(helper)
            pull(pinned(place, repo=signed_in, **common), tmp_path / "out")
            assert not (tmp_path / "credentials").exists()
            (tmp_path / "credentials").write_text(signed_in.removesuffix("/repo") + "\n")
            found = pull(pinned(place, repo=f"http://{server.host}/repo", **common), tmp_path / "out")
    assert found.repo == f"http://{server.host}/repo"
    assert content(tmp_path / "out") == content(place / "v2")


def test_credentials_that_libraries_quote_are_hidden(tmp_path, monkeypatch):
    """Parts without their scheme, percent-encoded or not, and the settings of the remote."""
    address = "https://me:p%40ss-word@host/a.git?token=qwerty-token"
    said = (
        "Max retries: /a.git?token=qwerty-token, me:p@ss-word, p%40ss-word, sess-ion, remo-te, " + "x" * 400
    )

    def fail(*args, **kwargs):
        raise OSError(said)

    config = PinnedConfig(repo=address, revision="main", path="a")
    monkeypatch.setattr("dvc.repo.Repo.open", fail)
    with pytest.raises(DatasetError, match="cannot be opened") as caught:
        pull(config, tmp_path / "out")
    texts = [str(caught.value)]
    settings = {"url": "ssh://u:remo-te@h/x", "session_token": "sess-ion"}
    with (
        pytest.raises(StorageError, match="cannot be read") as caught,
        dvc_errors(config, "storage", settings),
    ):
        fail()
    texts.append(str(caught.value))
    assert "Where: ssh://u:***@h/x" in texts[1]
    for text in texts:
        for secret in ("qwerty-token", "p@ss-word", "p%40ss-word"):
            assert secret not in text
    assert "sess-ion" not in texts[1]
    assert "remo-te" not in texts[1]


def test_a_repository_without_dvc_and_one_that_dvc_cannot_read(place, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    run(plain, "git", "init", "--quiet", "--initial-branch=main")
    (plain / "a").mkdir()
    (plain / "a" / "b").touch()
    run(plain, "git", "add", "--all")
    run(plain, "git", "commit", "--quiet", "--message", "one")
    with pytest.raises(DatasetError, match="DVC tracks no folder 'a'"):
        pull(pinned(place, repo=str(plain), revision="main", path="a"), tmp_path / "out")
    broken = Path(shutil.copytree(place / "clone", tmp_path / "broken", symlinks=True))
    (broken / "dvc.yaml").write_text("stages: [", encoding="utf-8")
    run(broken, "git", "commit", "--quiet", "--all", "--message", "broken")
    with pytest.raises(DatasetError, match=r"DVC cannot read revision main.*dvc list"):
        pull(pinned(place, repo=str(broken), revision="main"), tmp_path / "out")


def test_revision_of_a_folder(place, tmp_path):
    repo = Path(shutil.copytree(place / "repo", tmp_path / "repo", symlinks=True))
    (repo / ".dvc" / "tmp").mkdir(exist_ok=True)
    known = dvc_revision(repo / PREPARED)
    lock = yaml.safe_load((repo / "dvc.lock").read_text())["stages"]["prepare"]["outs"][0]
    commit = run(repo, "git", "rev-parse", "HEAD")
    assert known == {
        "dvc_md5": lock["md5"], "dvc_path": PREPARED, "dvc_file": "dvc.lock", "dvc_commit": commit,
    }  # fmt: skip
    assert dvc_revision(repo / PREPARED / "imagenet") == known
    assert dvc_revision(repo / "artifacts") == {}
    assert dvc_revision(tmp_path / "elsewhere" / "deep") == {}
    (repo / PREPARED / "one more").touch()
    assert dvc_revision(repo / PREPARED) == {}  # dvc.lock records other content


def test_revision_of_raw_data(tmp_path):
    (tmp_path / ".dvc").mkdir()
    raw = tmp_path / "raw" / "imagenet"
    raw.mkdir(parents=True)
    dvc_file = tmp_path / "raw" / "imagenet.dvc"
    dvc_file.write_text(yaml.safe_dump({"outs": [{"md5": "1.dir", "path": "imagenet", "nfiles": 7}]}))
    expected = {"dvc_md5": "1.dir", "dvc_path": "raw/imagenet", "dvc_file": "raw/imagenet.dvc"}
    assert dvc_revision(raw) == dvc_revision(raw / "train") == expected
    run(tmp_path, "git", "init", "--quiet")
    assert dvc_revision(raw) == expected  # no commit yet
    run(tmp_path, "git", "add", "--all")
    run(tmp_path, "git", "commit", "--quiet", "--message", "one")
    assert dvc_revision(raw)["dvc_commit"] == run(tmp_path, "git", "rev-parse", "HEAD")
    dvc_file.write_text(yaml.safe_dump({"wdir": "..", "outs": [{"md5": "2.dir", "path": "raw/imagenet"}]}))
    assert dvc_revision(raw)["dvc_md5"] == "2.dir"
    assert dvc_revision(raw)["dvc_commit"].endswith("+changes")
    for broken in ("outs: [", "- a", "outs:", "stages: 1"):
        dvc_file.write_text(broken)
        assert dvc_revision(raw) == {}


def test_reading_a_revision_does_not_import_dvc():
    code = "import sys, vitpipe.prepare.dvc_pull; print('dvc' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
