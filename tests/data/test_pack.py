import io
import tarfile

import pytest
from PIL import Image

from vitpipe.data.manifest import ShardManifest, read_manifest
from vitpipe.data.pack import Quarantine, image_problem, pack
from vitpipe.data.shards import ShardSet
from vitpipe.data.verify import verify_class_folders
from vitpipe.errors import DatasetError, StorageError


def pack_imagenet(root, out, *, shard_bytes=20_000, limit=0):
    layout = verify_class_folders(root / "imagenet", "imagenet")
    return pack(layout, out, shard_bytes=shard_bytes, quarantine=Quarantine(limit))


def test_packing_twice_gives_the_same_bytes(raw, tmp_path):
    first, second = pack_imagenet(raw, tmp_path / "a"), pack_imagenet(raw, tmp_path / "b")
    assert first == second
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_shards_are_plain_tars_that_webdataset_can_read(raw, tmp_path):
    manifest = pack_imagenet(raw, tmp_path / "packed")
    shards = manifest.splits["train"].shards
    assert len(shards) > 1
    originals = sorted((raw / "imagenet" / "train").rglob("*.JPEG"))
    images, labels = [], []
    for shard in shards:
        with tarfile.open(tmp_path / "packed" / shard.name) as tar:
            members = tar.getmembers()
            assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in members)
            for image, label in zip(members[::2], members[1::2], strict=True):
                # WebDataset groups by everything before the first dot.
                assert image.name.split(".", 1)[0] == label.name.split(".", 1)[0]
                assert (image.name.split(".", 1)[1], label.name.split(".", 1)[1]) == ("jpeg", "cls")
                images.append(tar.extractfile(image).read())
                labels.append(int(tar.extractfile(label).read()))
    assert images == [path.read_bytes() for path in originals]
    assert labels == [manifest.classes.index(path.parent.name) for path in originals]
    assert sum(shard.num_images for shard in shards) == len(originals)


def test_the_manifest_counts_and_names(raw, tmp_path):
    pack_imagenet(raw, tmp_path / "packed")
    manifest = read_manifest(tmp_path / "packed", ShardManifest)
    assert manifest.splits["train"].images_per_class == (3,) * 10
    assert manifest.splits["val"].images_per_class == (5,) * 10
    assert manifest.class_names[7] == "digit seven"
    assert len(manifest.digest) == 64


def test_the_digest_follows_the_content(raw_copy, tmp_path):
    before = pack_imagenet(raw_copy, tmp_path / "a").digest
    victim = next((raw_copy / "imagenet" / "train").rglob("*.JPEG"))
    Image.new("RGB", (32, 32), "red").save(victim, "JPEG")
    assert pack_imagenet(raw_copy, tmp_path / "b").digest != before


def test_odd_names_are_kept_apart(raw_copy, tmp_path):
    folder = raw_copy / "imagenet" / "train" / "n99900000"
    image = next(folder.iterdir()).read_bytes()
    for name in ("a.b.jpg", "a b.JPG", "ä" * 90 + ".jpeg", "a_b.jpg"):
        (folder / name).write_bytes(image)
    manifest = pack_imagenet(raw_copy, tmp_path / "packed", shard_bytes=10**9)
    shards = ShardSet(tmp_path / "packed", manifest, "train")
    keys = [shards.read(position).key for position in range(len(shards))]
    assert len(set(keys)) == len(shards) == 34
    with tarfile.open(tmp_path / "packed" / "train-000000.tar") as tar:
        assert all(name.count(".") == 1 and name.isascii() for name in tar.getnames())


def damage(raw):
    """One truncated, one empty and one that is text."""
    truncated, empty, text = sorted((raw / "imagenet" / "train").rglob("*.JPEG"))[:3]
    truncated.write_bytes(truncated.read_bytes()[:-200])
    empty.write_bytes(b"")
    text.write_text("not found")
    return [path.name for path in (truncated, empty, text)]


def test_corrupt_images_are_left_out_and_listed_by_name(raw_copy, tmp_path):
    names = damage(raw_copy)
    manifest = pack_imagenet(raw_copy, tmp_path / "packed", limit=3)
    assert [entry.file.rsplit("/", 1)[1] for entry in manifest.left_out] == names
    assert all(entry.reason for entry in manifest.left_out)
    assert manifest.splits["train"].num_images == 27


def test_more_corrupt_images_than_allowed_are_refused_with_their_names(raw_copy, tmp_path):
    names = damage(raw_copy)
    with pytest.raises(DatasetError, match="3 files cannot be decoded, 2 are allowed") as caught:
        pack_imagenet(raw_copy, tmp_path / "packed", limit=2)
    assert all(name in str(caught.value) for name in names)
    assert "data.max_corrupt_images to at least 3" in caught.value.mend


def test_a_message_names_a_few_of_many(tmp_path):
    quarantine = Quarantine(0)
    for number in range(50):
        quarantine.add("imagenet", "train", f"{number}.jpg", "empty file")
    with pytest.raises(DatasetError, match="and 30 more"):
        quarantine.check(tmp_path)


def test_a_folder_among_the_images_is_listed(raw_copy, tmp_path):
    (raw_copy / "imagenet" / "train" / "n99900000" / "more").mkdir()
    manifest = pack_imagenet(raw_copy, tmp_path / "packed", limit=1)
    assert manifest.left_out[0].reason == "a folder, not an image"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_whole_images_are_accepted_and_halves_refused(image_format):
    buffer = io.BytesIO()
    Image.effect_noise((64, 48), 60).convert("RGB").save(buffer, image_format)
    image = buffer.getvalue()
    assert image_problem(image) == ""
    assert image_problem(image[: len(image) // 2])


def test_a_full_disk_is_a_storage_error(raw, tmp_path):
    out = tmp_path / "packed"

    class FullWhenMade(type(out)):
        """Puts the kernel's always-full device where the first shard will be written."""

        def mkdir(self, *arguments, **options):
            super().mkdir(*arguments, **options)
            (self / "train-000000.tar").symlink_to("/dev/full")

    with pytest.raises(StorageError, match="No space left"):
        pack_imagenet(raw, FullWhenMade(out))
