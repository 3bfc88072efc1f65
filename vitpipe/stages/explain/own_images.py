"""What a trained classifier looks at in the user's own images (`vitpipe explain`).

run or weights file > classifier > image files > `ImageExplainer` > pictures, table in a folder
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import write_table
from vitpipe.contracts.errors import ArtifactError, InputError, disk_errors, reason_of
from vitpipe.contracts.spelling import did_you_mean
from vitpipe.contracts.units import counted
from vitpipe.data.image_grid import write_grid
from vitpipe.data.image_pixels import as_packed, encoding_of
from vitpipe.datasets.catalogue import class_names, class_order
from vitpipe.evaluate.explain_images import Figure, ImageExplainer, ShownImage
from vitpipe.evaluate.image_classifier import ImageClassifier
from vitpipe.prepare.set_summary import read_set, readable_classes
from vitpipe.stages.explain.config import ExplainConfig
from vitpipe.stages.explain.stage import settings_of
from vitpipe.stages.output_folders import check_result_folder
from vitpipe.stages.report.stage import results_of_folder
from vitpipe.stages.training import check_classes

# Where a classifier comes from, the last stage first.
_STAGES = ("finetune", "intermediate")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_NAMED = 5  # wrong files in one message
_MOST_OF_NAME = 60  # characters of an image's name in that of its picture


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier with what is known of it.

    Attributes:
        recipe: that it was trained by.
        stage: of the recipe, which says crop and normalisation.
        classes: keys of its classes.
        names: the same in words.
    """

    classifier: ImageClassifier
    recipe: Recipe
    stage: str
    classes: tuple[str, ...]
    names: tuple[str, ...]


def classifier_of_run(folder: Path, device: str) -> TrainedClassifier:
    """The classifier of a finished run, `artifacts/RECIPE/PROFILE`, or of its stage's folder.

    Raises:
        ArtifactError: when no stage that trains a classifier has run there, or its data is gone.
        CheckpointError: when the weights are damaged.
    """
    run = folder.parent if folder.name in _STAGES else folder
    results = results_of_folder(run)
    wanted = (folder.name,) if run is not folder else _STAGES
    stage = next((name for name in wanted if name in results.artifacts), None)
    if stage is None or "prepare" not in results.artifacts:
        missing = "prepare" if stage else " or ".join(wanted)
        raise ArtifactError(
            f"The run has no output of stage {missing}",
            where=run,
            fix="run it first (`dvc repro`), or give the folder of another run",
        )
    section = getattr(results.recipe, stage)
    manifest = read_set(results.artifacts["prepare"].path, section.dataset)
    known, weights = readable_classes(manifest), results.artifacts[stage].weights
    classifier = ImageClassifier(weights, results.recipe, stage, device)
    check_classes(classifier.model, manifest.classes, section.dataset, weights)
    names = tuple(known.get(key, key) for key in manifest.classes)
    return TrainedClassifier(classifier, results.recipe, stage, manifest.classes, names)


def classifier_of_weights(weights: Path, recipe: Recipe, device: str) -> TrainedClassifier:
    """The classifier of a weights file, for example of a converted checkpoint.

    Its classes are those of the set that the recipe fine-tunes on, where it has as many; else numbers.

    Raises:
        InputError: when the recipe trains no classifier.
        CheckpointError: when the file cannot be read or is another network's.
    """
    stage = next((name for name in _STAGES if getattr(recipe, name, None) is not None), None)
    if stage is None:
        raise InputError(
            f"The recipe '{recipe.name}' trains no classifier",
            where="--recipe",
            fix="name a recipe with a stage finetune",
        )
    classifier = ImageClassifier(weights, recipe, stage, device)
    number, dataset = classifier.model.num_classes, getattr(recipe, stage).dataset
    keys, names = class_order(dataset), class_names(dataset)
    if len(keys) != number:
        keys = names = tuple(f"class {place}" for place in range(number))
    return TrainedClassifier(classifier, recipe, stage, keys, names)


def image_files(given: Sequence[Path]) -> list[Path]:
    """The files that were given, and in the place of a folder the image files in it, by name.

    Raises:
        InputError: when one does not exist, or a folder has no image files.
    """
    found: list[Path] = []
    for path in given:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGES) if path.is_dir() else [path]
        if not path.exists() or not inside:
            what = "The folder has no image files" if path.is_dir() else "The image does not exist"
            raise InputError(what, where=path, fix=f"give image files ({', '.join(_IMAGES)}) or their folder")
        found += inside
    return found


def explain_own_images(
    trained: TrainedClassifier,
    files: Sequence[Path],
    out: Path,
    section: ExplainConfig,
    *,
    label: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Explain images of any size, cropped as in evaluation; writes pictures and `tables/` into a new folder.

    Args:
        out: must be new or empty; nothing is left there when this fails.
        section: what to show.
        label: key or name of the class that all images are of; without it each image's is the one that the
            network gives.
        say: takes a line for every picture.

    Returns:
        As `Explanation.metrics`.

    Raises:
        InputError: an unknown class, a file that is no image, a stage without clusters.
        ArtifactError: `out` cannot be used.
        StorageError: when the disk refuses a write.
    """
    folder = check_result_folder("--out", out)
    if folder.is_dir() and any(folder.iterdir()):
        raise ArtifactError("--out is not empty", where=folder, fix="name a folder that is new or empty")
    model = trained.recipe.model
    if misfit := section.network_misfit(model):
        raise InputError(
            f"The images cannot be explained: {misfit}",
            where="--stage",
            fix="choose another stage or network",
        )
    number = None if label is None else _number_of(label, trained)
    pictures = _opened(files, trained.recipe)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: a folder of half the pictures would look like all of them.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
            whole = Path(place) / folder.name
            whole.mkdir()

            def draw(figure: Figure) -> None:
                file = whole / f"{figure.name}.png"
                write_grid(file, figure.sections, columns=figure.columns, note=figure.note)
                say(f"{figure.name}.png")

            metrics = _explain(trained, files, pictures, number, section, draw, whole)
            whole.replace(folder)
    return metrics


def _explain(
    trained: TrainedClassifier,
    files: Sequence[Path],
    pictures: Sequence[Image.Image],
    number: int | None,
    section: ExplainConfig,
    draw: Callable[[Figure], None],
    folder: Path,
) -> dict[str, float]:
    own, augment = trained.classifier, getattr(trained.recipe, trained.stage).augment
    mean, std = (torch.tensor(v, device=own.device).view(3, 1, 1) for v in (augment.mean, augment.std))
    explainer = ImageExplainer(own.model, trained.names, (mean, std), settings_of(section), draw)
    shown = []
    for place, (file, picture) in enumerate(zip(files, pictures, strict=True)):
        crop = own.transform(picture)
        assert isinstance(crop, torch.Tensor)
        pixels = (crop.to(own.device) * std + mean).clamp(0.0, 1.0)
        label = int(explainer.probabilities(pixels).argmax()) if number is None else number
        figure = f"{place:03d}_{re.sub(r'[^0-9A-Za-z._-]', '_', file.stem)[:_MOST_OF_NAME]}"
        # Bytes of a name that are no text would fail in table and picture.
        name = str(file).encode("utf-8", "backslashreplace").decode()
        shown.append(ShownImage(name, name, figure, pixels, label, is_predicted=number is None))
    has_clusters = bool(trained.recipe.model.num_clusters)
    found = explainer.by_clusters(shown) if has_clusters else explainer.by_attention(shown)
    write_table(folder, found.table, found.rows)
    return found.metrics


def _number_of(label: str, trained: TrainedClassifier) -> int:
    for known in (trained.classes, trained.names):
        if label in known:
            return known.index(label)
    guess = did_you_mean(label, (*trained.classes, *trained.names))
    raise InputError(
        f"The network has no class '{label}'{guess}",
        where="--class",
        fix=f"name one of its {counted(len(trained.classes), 'class', 'classes')}, or leave the option out",
    )


def _opened(files: Sequence[Path], recipe: Recipe) -> list[Image.Image]:
    """All images, with the pixels that training on the same files would have."""
    encoding, found, mistakes = encoding_of(recipe.data), [], []
    for file in files:
        try:
            with warnings.catch_warnings():
                # Pillow advises its callers about palettes with transparency; they are read correctly.
                warnings.simplefilter("ignore", UserWarning)
                found.append(as_packed(file.read_bytes(), encoding))
        except UnidentifiedImageError:  # whose text names an object of Python's
            mistakes.append(f"{file} (no image)")
        except Exception as error:  # decoders raise errors of many classes on bad bytes
            mistakes.append(f"{file} ({reason_of(error)})")
    if mistakes:
        more = f", and {len(mistakes) - _NAMED} more" if len(mistakes) > _NAMED else ""
        raise InputError(
            f"No image can be read from {', '.join(mistakes[:_NAMED])}{more}; nothing was written",
            where="IMAGES",
            fix="leave them out, or convert them to JPEG or PNG",
        )
    return found
