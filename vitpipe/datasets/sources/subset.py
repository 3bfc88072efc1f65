"""Some classes of a set (`classes_of` in its facts), from any of its formats.

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


def take_classes(source: Source, dataset: str, keys: Sequence[str], base: str) -> Source:
    """Restrict a source to some classes; tars of other classes are not opened.

    Args:
        keys: of the classes, in the order of their new numbers.
        base: name of the whole set.

    Raises:
        DatasetError: when some of the classes are missing.
    """
    missing = [key for key in keys if key not in source.classes]
    if missing:
        raise DatasetError(
            f"{len(missing)} of the {len(keys)} classes of '{dataset}' "
            f"{'is' if len(missing) == 1 else 'are'} missing: {some(missing)}",
            where=source.root,
            fix=f"put all of {base} into {base}/, or class folders of these names into {dataset}/",
        )
    names = dict(zip(source.classes, source.class_names, strict=True)) if source.class_names else {}
    class_names = tuple(names[key] for key in keys) if names else ()
    # A folder that holds exactly the subset is the user's own selection: nothing to note.
    if len(keys) == len(source.classes):
        form, notes = source.form, source.notes
    else:
        form = f"{len(keys)} classes of {base}: {source.form}"
        notes = (
            *source.notes,
            f"{len(keys)} of the {len(source.classes)} classes below {source.root.name}/",
        )
    # `ClassSource` lists by key in the order of `classes`, so replacing these is enough and renumbers the
    # labels.
    if isinstance(source, ClassSource):
        return replace(
            source, dataset=dataset, form=form, classes=tuple(keys), class_names=class_names, notes=notes
        )
    return _Filtered(dataset, source.root, form, tuple(keys), source, class_names, source.splits, notes)
