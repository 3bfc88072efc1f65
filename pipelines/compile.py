"""Compile a recipe into a Kubeflow pipeline package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.findings import findings, require_release
from pipelines.lint import check_package_rules
from pipelines.package import Package, check_arguments, check_carried_texts, check_texts, validate_package
from pipelines.place import check_fits
from pipelines.placement import Placement
from pipelines.transfer import check_addresses, stages_left
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import InputError, disk_errors
from vitpipe.contracts.files import written_aside
from vitpipe.contracts.graph import Image, graph_of
from vitpipe.papers.published import check_expected

if TYPE_CHECKING:
    from kfp.dsl.base_component import BaseComponent


def default_images() -> dict[Image, str]:
    """The project's images at the installed version."""
    tag = version("vitpipe")
    return {"train": f"vitpipe-train:{tag}", "dense": f"vitpipe-dense:{tag}"}


def compile_pipeline(
    recipe: str,
    profile: str,
    overrides: Sequence[str],
    out: Path,
    *,
    images: Mapping[Image, str] | None = None,
    placement: Placement | None = None,
    data_digest: str = "",
    release: bool = False,
    imported: Mapping[str, str] | None = None,
) -> Package:
    """Compile the pipeline of one recipe into `out`, which is written only if it passes `validate_package`.

    Args:
        recipe: name of a recipe.
        profile: name of a profile.
        overrides: `section.key=value`; they decide the graph (`stages=...`) and become pipeline parameters.
        out: file ending in .yaml.
        images: image reference for `train` and `dense`; default: `default_images`.
        placement: the cluster; by default without volumes, node labels and MLflow.
        data_digest: any text that changes with the raw data, for Kubeflow's cache.
        release: refuse what would only be said as the package's findings.
        imported: stage -> address of its finished output, see `pipelines.transfer`.

    Raises:
        RecipeError: the recipe cannot be read.
        InputError: `out` does not end in .yaml or is another file, a value is refused (`check_texts`), or a
            task fits no node.
        StorageError: when the disk refuses the write.
    """
    chosen = load_recipe(recipe, profile, overrides)
    check_texts((recipe, profile, *overrides, data_digest), "recipe, profile, overrides and data digest")
    check_carried_texts(recipe, profile)
    check_expected(chosen)
    check_package_path(out)
    if imported:
        check_addresses(chosen, imported)
        check_texts(imported.values(), "--start-from")
        left = f"stages=[{', '.join(stages_left(chosen, imported))}]"
        chosen = load_recipe(recipe, profile, [*overrides, left])
    chosen.data.require_root(f"recipe {recipe}, profile {profile}")

    placement = placement or Placement()
    nodes = graph_of(chosen.stages, chosen.start_from)
    nodes = tuple(node for node in nodes if node.name not in (imported or {}))
    check_fits(((node.stage, chosen) for node in nodes), placement)
    references = {**default_images(), **(images or {})}
    used = [references[node.stage.image] for node in nodes]
    found = findings(chosen, placement, used, data_digest)
    if release:
        require_release(found)

    # After all checks of the input: importing kfp costs 3 s.
    from pipelines.reproduce import reproduce

    pipeline = reproduce(recipe, chosen, overrides, references, placement, data_digest, imported)
    return replace(write_package(pipeline, out), findings=found)


def check_package_path(out: Path) -> None:
    """Refuse a file that cannot be a package, before the seconds that kfp takes.

    Raises:
        InputError: it does not end in .yaml, or is another file.
    """
    if out.suffix not in (".yaml", ".yml"):
        # kfp's compiler chooses the format by the suffix and refuses others with a message of its own.
        raise InputError("A pipeline package ends in .yaml", where=out, fix="choose another --out name")
    _refuse_foreign_file(out)


def write_package(pipeline: BaseComponent, out: Path) -> Package:
    """Compile a pipeline into `out`, which is written only if it passes `validate_package`.

    Raises:
        StorageError: when the disk refuses the write.
    """
    from kfp import compiler

    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as partial:
        compiler.Compiler().compile(pipeline, str(partial))
        package = validate_package(partial)
        # Every task reads what it carries, as it will in its pod.
        check_arguments(package, package.parameters)
        check_package_rules(partial)
    return validate_package(out)


def _refuse_foreign_file(out: Path) -> None:
    """Overwrite nothing but an earlier package: params.yaml and recipes end in .yaml, too."""
    if not out.exists() and not out.is_symlink():
        return
    text = out.read_text(encoding="utf-8", errors="replace") if out.is_file() else ""
    if not out.is_file() or (text.strip() and "pipelineInfo:" not in text):
        raise InputError(
            "The output file exists and is not a pipeline package; nothing was written",
            where=out,
            fix="choose another --out name",
        )
