"""ImageNet-100 and ImageNet-10: subsets of the classes of ImageNet-1K, from any of its formats.

ImageNet-100 has the classes of contrastive multiview coding (Tian et al., ECCV 2020), ImageNet-10 those of
contrastive clustering (Li et al., AAAI 2021). Class numbers follow the sorted wnids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitpipe.contracts.errors import DatasetError, some
from vitpipe.datasets.sources.class_listing import ClassSource
from vitpipe.datasets.sources.source import ImageEntry, Source

SUBSETS = ("imagenet100", "imagenet10")


@dataclass(eq=False)
class _Filtered(Source):
    """A subset of the classes of a source that cannot be listed class by class (parquet)."""

    dataset: str
    root: Path
    form: str
    classes: tuple[str, ...]
    whole: Source = field(repr=False)
    class_names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train", "val")
    notes: tuple[str, ...] = ()

    def entries(self, split: str) -> Iterator[ImageEntry]:
        """Yield the images in the order of the whole source."""
        new_label = {self.whole.classes.index(key): label for label, key in enumerate(self.classes)}
        for entry in self.whole.entries(split):
            if entry.label in new_label:
                yield replace(entry, label=new_label[entry.label])


def take_classes(source: Source, dataset: str, wnids: Sequence[str]) -> Source:
    """Restrict a source to some classes; tars of other classes are not opened.

    Raises:
        DatasetError: when some of the classes are missing.
    """
    missing = [wnid for wnid in wnids if wnid not in source.classes]
    if missing:
        raise DatasetError(
            f"{len(missing)} of the {len(wnids)} classes of '{dataset}' are missing: {some(missing)}",
            where=source.root,
            fix=f"put all of ImageNet-1K into imagenet/, or class folders named by wnid into {dataset}/",
        )
    names = dict(zip(source.classes, source.class_names, strict=True)) if source.class_names else {}
    class_names = tuple(names[wnid] for wnid in wnids) if names else ()
    # A folder that holds exactly the subset is the user's own selection: nothing to note.
    if len(wnids) == len(source.classes):
        form, notes = source.form, source.notes
    else:
        form = f"{len(wnids)} classes of ImageNet-1K: {source.form}"
        notes = (
            *source.notes,
            f"{len(wnids)} of the {len(source.classes)} classes below {source.root.name}/",
        )
    # `ClassSource` lists by key in the order of `classes`, so replacing these is enough and renumbers the
    # labels.
    if isinstance(source, ClassSource):
        return replace(
            source, dataset=dataset, form=form, classes=tuple(wnids), class_names=class_names, notes=notes
        )
    return _Filtered(dataset, source.root, form, tuple(wnids), source, class_names, source.splits, notes)
