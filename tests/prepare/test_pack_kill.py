"""Packing is killed at random points; a resumed run must write the bytes of an uninterrupted one."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from vitpipe.datasets.sources.detect_format import find_source
from vitpipe.datasets.sources.source import ImageEntry, Source
from vitpipe.prepare import pack as packing
from vitpipe.prepare import shard_writer
from vitpipe.prepare.examine_parallel import PackOptions
from vitpipe.prepare.pack import Quarantine, pack

pytestmark = pytest.mark.slow

SETTINGS = {"shard_bytes": 15_000, "hashed": True}


def run(root, out, scratch, workers=0):
    options = PackOptions(**SETTINGS, workers=workers)
    return pack(
        find_source(root, "imagenet"), out, options=options, quarantine=Quarantine(1), scratch=scratch
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class KillPoints:
    """Counts the points between two effects on the disk, and kills this process at one of them."""

    def __init__(self, monkeypatch, kill_at=None):
        self.count, self.kill_at = 0, kill_at
        write, to_disk = shard_writer.ShardWriter._write, shard_writer._to_disk
        replace, link = Path.replace, Path.hardlink_to

        def half_write(writer, block):
            self.pass_by(lambda: (writer._file.write(block[: len(block) // 2]), writer._file.flush()))
            write(writer, block)

        def watched(effect):
            def call(*arguments, **options):
                self.pass_by()
                result = effect(*arguments, **options)
                self.pass_by()
                return result

            return call

        monkeypatch.setattr(shard_writer.ShardWriter, "_write", half_write)
        monkeypatch.setattr(shard_writer, "_to_disk", watched(to_disk))
        monkeypatch.setattr(Path, "replace", watched(replace))
        monkeypatch.setattr(Path, "hardlink_to", watched(link))
        monkeypatch.setattr(packing, "write_manifest", watched(packing.write_manifest))

    def pass_by(self, last_act=lambda: None):
        self.count += 1
        if self.count == self.kill_at:
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)


def killed_run(root, out, scratch, kill_at, workers, num_passed):
    with pytest.MonkeyPatch.context() as monkeypatch:
        points = KillPoints(monkeypatch, kill_at)
        run(root, out, scratch, workers)
        num_passed.value = points.count


def start(root, out, scratch, kill_at=None, workers=0):
    """Pack in a separate process; returns its exit code and the number of kill points it passed."""
    context = multiprocessing.get_context("fork")
    num_passed = context.Value("i", 0)
    process = context.Process(target=killed_run, args=(root, out, scratch, kill_at, workers, num_passed))
    process.start()
    process.join(120)
    return process.exitcode, num_passed.value


@pytest.fixture(scope="module")
def source(raw, tmp_path_factory):
    """The embedded dataset with one corrupt image, so that the findings file is truncated too."""
    root = tmp_path_factory.mktemp("source")
    shutil.copytree(raw / "imagenet", root / "imagenet")
    sorted((root / "imagenet" / "train").rglob("*.JPEG"))[17].write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    exit_code, num_points = start(source, folder / "out", folder / "scratch")
    assert exit_code == 0
    return contents(folder / "out"), num_points


@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_any_point_changes_no_byte(source, uninterrupted, tmp_path, trial):
    expected, num_points = uninterrupted
    # Every fifth trial examines images in worker processes.
    workers = 2 if trial % 5 == 0 else 0
    kill_at = random.Random(trial).randrange(1, num_points + 1)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    exit_code, _ = start(source, out, scratch, kill_at, workers)
    assert exit_code == -signal.SIGKILL
    complete = {path.name: path.read_bytes() for path in scratch.glob("*.tar")}
    assert all(expected[name] == content for name, content in complete.items())
    # The stage writes into a fresh folder when it is started again.
    shutil.rmtree(out, ignore_errors=True)
    run(source, out, scratch, workers)
    assert contents(out) == expected


def test_a_run_that_is_killed_repeatedly_finishes(source, uninterrupted, tmp_path):
    expected, num_points = uninterrupted
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    for _ in range(100):
        shutil.rmtree(out, ignore_errors=True)
        if start(source, out, scratch, kill_at=num_points // 4)[0] == 0:
            break
    else:
        pytest.fail("it did not finish in 100 attempts")
    assert contents(out) == expected


@pytest.mark.parametrize("damage", ["a shard is gone", "a shard is cut", "the index is cut", "journal torn"])
def test_a_damaged_scratch_folder_is_detected(source, uninterrupted, tmp_path, damage):
    expected, num_points = uninterrupted
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    start(source, out, scratch, kill_at=num_points // 2)
    shard = scratch / "train-000000.tar"
    if damage == "a shard is gone":
        shard.unlink()
    elif damage == "a shard is cut":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif damage == "the index is cut":
        (scratch / "train.index").write_bytes(b"")
    else:
        with (scratch / "train.journal").open("ab") as journal:
            journal.write(b'{"shard": {"name"')
    shutil.rmtree(out, ignore_errors=True)
    run(source, out, scratch)
    assert contents(out) == expected


def test_a_source_that_changed_after_the_kill_is_packed_again(source, uninterrupted, tmp_path):
    expected, num_points = uninterrupted
    root, out, scratch = tmp_path / "source", tmp_path / "out", tmp_path / "scratch"
    shutil.copytree(source, root)
    start(root, out, scratch, kill_at=num_points // 2)
    first = sorted((root / "imagenet" / "train").rglob("*.JPEG"))[0]
    first.rename(first.with_name("renamed.JPEG"))
    shutil.rmtree(out, ignore_errors=True)
    run(root, out, scratch)
    fresh = tmp_path / "fresh"
    run(root, fresh, tmp_path / "fresh-scratch")
    assert contents(out) == contents(fresh) != expected


class Slow:
    """A byte range whose reading records the process and then takes two minutes."""

    def __init__(self, folder):
        self.folder = folder

    def read(self):
        (self.folder / str(os.getpid())).touch()
        time.sleep(120)

    def stamp(self):
        return "slow"


class SlowSource(Source):
    dataset, form, classes, splits = "imagenet", "a list", ("a",), ("train",)

    def __init__(self, folder):
        self.root = folder

    def entries(self, split):
        return (ImageEntry(f"{number}.jpg", 0, Slow(self.root), "") for number in range(1000))


def pack_slowly(folder):
    options = PackOptions(1000, workers=2)
    pack(
        SlowSource(folder), folder / "out", options=options, quarantine=Quarantine(0), scratch=folder / "work"
    )


def test_a_killed_packer_leaves_no_processes_behind(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=pack_slowly, args=(tmp_path,))
    process.start()
    assert wait_for(lambda: any(path.name.isdecimal() for path in tmp_path.iterdir()))
    process.kill()
    process.join()
    workers = [path.name for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert wait_for(lambda: not any(is_alive(number) for number in workers))


def is_alive(number):
    try:
        return " Z " not in Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()
