"""What a package lacks to be useful on a cluster: said by `vitpipe compile`, refused by `--release`.

The embedded data of a demo need none of it. Real data need a volume they lie on, a store for what `prepare`
makes of them, a place for saved states, and names by which Kubeflow's cache tells one version from another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipelines.placement import Claim, Placement
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.units import format_bytes
from vitpipe.datasets.set_sizes import sized_facts

# Kubeflow copies an input artifact into the pod of every task that takes it.
_LARGE_BYTES = 2e9


@dataclass(frozen=True)
class Finding:
    """One lack, and what to do about it."""

    what: str
    fix: str


def findings(
    recipe: Recipe, placement: Placement, images: Iterable[str], data_digest: str
) -> tuple[Finding, ...]:
    """Everything that would spoil a run on a cluster, in the order of its damage.

    Args:
        images: references of the images that the tasks run in.
        data_digest: the default of the parameter of that name.
    """
    of_data = () if recipe.data.source == "embedded" else _of_real_data(recipe, placement, data_digest)
    return (*of_data, *_of_images(images))


def require_release(found: tuple[Finding, ...]) -> None:
    """Refuse a package with findings.

    Raises:
        InputError: names all of them with their fixes.
    """
    if found:
        raise InputError(
            f"The package is not ready for a cluster: {'; '.join(item.what for item in found)}",
            where="--release",
            fix="; ".join(item.fix for item in found),
        )


def _of_real_data(recipe: Recipe, placement: Placement, data_digest: str) -> Iterator[Finding]:
    data, claims = recipe.data, placement.claims
    root, volume = data.root, data.volume
    if root is not None and not _lies_on(str(root), claims.data):
        yield Finding(
            f"data.root {root} is on no volume of the pods",
            "name the claim with the raw data in the placement (claims.data), mounted at data.root or above",
        )
    sizes_bytes = {name: sized_facts(name, data).size_bytes for name in data.names}
    large = {name: size for name, size in sizes_bytes.items() if size > _LARGE_BYTES}
    if data.store is None and large:
        sizes = ", ".join(f"{name} about {format_bytes(size)}" for name, size in large.items())
        yield Finding(
            f"without data.store the prepared sets travel as artifacts into every pod ({sizes})",
            "set data.store to s3://bucket/prefix or to a folder of a claim",
        )
    elif volume is not None and not any(_lies_on(str(volume), c) for c in (claims.data, claims.state)):
        yield Finding(f"data.store {volume} is on no volume of the pods", "put it below a claim's path")
    if claims.state is None:
        yield Finding(
            "without claims.state a task that loses its pod begins again",
            "name a claim for saved states in the placement",
        )
    if placement.tracking is None:
        yield Finding(
            "without 'tracking' in the placement MLflow gets nothing", "name MLflow's address there"
        )
    if not data_digest:
        yield Finding(
            "the parameter data_digest is empty, so Kubeflow's cache does not notice changed raw data",
            "give --data-digest, any text that changes with them, such as a date or a DVC revision",
        )


def _of_images(images: Iterable[str]) -> Iterator[Finding]:
    if named := sorted({image for image in images if "@sha256:" not in image}):
        yield Finding(
            f"images are named by a tag, whose changes Kubeflow's cache does not detect: {', '.join(named)}",
            "give --image train=NAME@sha256:... and --image dense=NAME@sha256:...",
        )


def _lies_on(path: str, claim: Claim | None) -> bool:
    return claim is not None and PurePosixPath(path).is_relative_to(claim.path)
