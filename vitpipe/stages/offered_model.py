"""Offer the network of a finished stage to MLflow's model registry, with a card that says what it is."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence

from vitpipe.config.digest import git_commit
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import TABLES, WEIGHTS, Artifact
from vitpipe.contracts.errors import DatasetError
from vitpipe.contracts.graph import all_stages, graph_of
from vitpipe.contracts.protocol import PROTOCOL
from vitpipe.data.image_pixels import rgb_file
from vitpipe.data.manifest import DenseManifest, ShardManifest
from vitpipe.datasets.catalogue import facts as facts_of_set
from vitpipe.prepare.set_summary import read_prepared
from vitpipe.report.compare import Verdict
from vitpipe.report.model_card import CardFacts, SetFacts, model_card
from vitpipe.report.recipe_differences import chain_of
from vitpipe.report.results import RunResults
from vitpipe.stages.context import StageContext
from vitpipe.track.journal import OfferedModel
from vitpipe.track.model_folder import (
    CARD_FILE,
    EXAMPLE_FILE,
    LABELS_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    can_predict,
    labels_text,
)
from vitpipe.track.model_registry import registered_name
from vitpipe.track.stage_run import StageRun

# Where a layout has the pictures of its validation set.
_VAL_FOLDERS = {"coco": "val2017", "ade20k": "images/validation"}
_EXAMPLE_SIDE = 512  # pixels: enough to show how a picture is posted


def offer_model(ctx: StageContext, metrics: Mapping[str, float]) -> None:
    """Offer the stage's network to the registry of the tracking server.

    To be called when weights, tables and metrics are in the stage's folder.
    """
    stage = all_stages()[ctx.stage]
    # A detector whose set has no objects has no AP.
    is_measured = stage.headline in metrics
    if not is_measured or not can_predict(stage.name) or not isinstance(ctx.logger, StageRun):
        return
    manifest = read_prepared(ctx.inputs["data"].path)[ctx.section.dataset]
    names = manifest.class_names if isinstance(manifest, ShardManifest) else ()
    with (ctx.folder / TABLES / f"{PROTOCOL}.csv").open(newline="", encoding="utf-8") as handle:
        protocol = list(csv.DictReader(handle))
    sets = _sets(ctx.recipe, stage.name, ctx.inputs["data"])
    card = CardFacts(ctx.recipe, stage.name, metrics, protocol, sets, git_commit())
    ctx.logger.offer_model(
        OfferedModel(
            registered_name(ctx.recipe.name, stage.name),
            stage.reads,
            stage.headline,
            metrics[stage.headline],
            f"{ctx.section.dataset} {manifest.digest[:8]}",
            {
                "recipe": ctx.recipe.name,
                "profile": ctx.recipe.profile,
                "seed": str(ctx.recipe.seed),
                "stage": stage.name,
            },
        ),
        {
            WEIGHTS_FILE: ctx.folder / WEIGHTS,
            RECIPE_FILE: ctx.recipe.model_dump_json(indent=1) + "\n",
            LABELS_FILE: labels_text(stage.name, manifest.classes, names),
            EXAMPLE_FILE: _example(ctx, manifest),
            CARD_FILE: model_card(card),
        },
    )


def cards_with_verdicts(run: RunResults, verdicts: Sequence[Verdict]) -> dict[str, str]:
    """MLflow run of a stage -> card of the model that it has registered, now with its verdict."""
    cards = {}
    for name, artifact in run.artifacts.items():
        section = getattr(run.recipe, name, None)
        if not getattr(section, "register_model", False) or not artifact.run.tracking_run:
            continue
        card = CardFacts(
            run.recipe,
            name,
            artifact.metrics,
            artifact.tables().get(PROTOCOL, []),
            _sets(run.recipe, name, run.artifacts["prepare"]),
            artifact.run.git_commit,
            [verdict for verdict in verdicts if verdict.stage in _judged(name)],
        )
        cards[artifact.run.tracking_run] = model_card(card)
    return cards


def _judged(stage: str) -> set[str]:
    """The stages whose verdicts are about a stage's network."""
    # `evaluate` measures the same weights once more.
    return {stage, "evaluate"} if stage == "finetune" else {stage}


def _sets(recipe: Recipe, stage: str, prepared: Artifact) -> list[SetFacts]:
    """The stage's own dataset, then those of the stages that its weights come from."""
    try:
        manifests = read_prepared(prepared.path)
    except DatasetError:  # a card must not fail the report of a folder that somebody has thinned out
        return []
    chain = chain_of(graph_of(recipe.stages, recipe.start_from), stage)
    named = [getattr(getattr(recipe, node.name, None), "dataset", "") for node in reversed(chain)]
    return [_set_facts(name, manifests[name], recipe) for name in dict.fromkeys(named) if name in manifests]


def _set_facts(name: str, manifest: ShardManifest | DenseManifest, recipe: Recipe) -> SetFacts:
    known = facts_of_set(name, recipe.data)
    if isinstance(manifest, ShardManifest):
        counts = {split: found.num_images for split, found in manifest.splits.items()}
    else:
        counts = {split: manifest.counts.get(f"{split}_images", 0) for split in ("train", "val")}
    return SetFacts(
        name,
        known.title,
        known.licence,
        counts.get("train", 0),
        counts.get("val", 0),
        len(manifest.classes),
        manifest.digest,
    )


def _example(ctx: StageContext, manifest: ShardManifest | DenseManifest) -> bytes:
    """A picture of the validation set as a JPEG file, at most 512 pixels long."""
    from vitpipe.data.shards import open_shards
    from vitpipe.datasets.dense_folder import open_dense

    prepared = ctx.inputs["data"].path
    if isinstance(manifest, ShardManifest):
        picture, _ = open_shards(prepared, ctx.section.dataset, "val").decode(0)
    else:
        root = open_dense(prepared, ctx.section.dataset, ctx.state / "data").root
        with os.scandir(root / _VAL_FOLDERS[all_stages()[ctx.stage].reads]) as entries:
            first = min(entry.path for entry in entries if entry.name.lower().endswith((".jpg", ".jpeg")))
        picture = rgb_file(first)
    picture.thumbnail((_EXAMPLE_SIDE, _EXAMPLE_SIDE))
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=95)
    return content.getvalue()
