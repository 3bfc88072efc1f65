"""A pipeline that starts from a finished stage: transfer to COCO or ADE20K without the pre-training.

    vitpipe compile --recipe itpn/pixel_base --start-from pretrain=s3://bucket/v2/artifacts/.../pretrain/.../out

The address is that of a stage's output folder, with its card: an earlier run's, or one that `vitpipe run` has
written. It is a parameter of the pipeline, and the card in it is checked by every task that takes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.graph import all_stages, graph_of
from vitpipe.contracts.spelling import did_you_mean

_SCHEMES = ("s3", "gs", "minio", "oci")


def check_addresses(recipe: Recipe, imported: Mapping[str, str]) -> None:
    """Refuse what cannot take the place of a stage.

    Raises:
        InputError: a stage that this recipe does not have or that gives no weights, an address that is none.
    """
    for stage, address in imported.items():
        weighty = [name for name in recipe.stages if all_stages()[name].gives_weights]
        if stage not in weighty:
            raise InputError(
                f"'{stage}' is no stage of this recipe that gives weights{did_you_mean(stage, weighty)}",
                where="--start-from",
                fix=f"name one of: {', '.join(weighty)}",
            )
        if urlsplit(address).scheme not in _SCHEMES and not address.startswith("/"):
            raise InputError(
                f"'{address}' is no address of a stage's output",
                where=f"--start-from {stage}",
                fix=f"give {', '.join(f'{scheme}://' for scheme in _SCHEMES)} or an absolute path",
            )


def stages_left(recipe: Recipe, imported: Iterable[str]) -> tuple[str, ...]:
    """The recipe's stages without those whose only use is to make what is imported."""
    given = set(imported)
    nodes = {node.name: node for node in graph_of(recipe.stages, recipe.start_from)}

    def with_feeders(name: str) -> set[str]:
        feeders = () if name in given else nodes[name].inputs.values()
        return {name}.union(*(with_feeders(feeder) for feeder in feeders))

    # The report takes every stage, and the trunk of the graph is there for what follows from it.
    ends = [
        name
        for name, node in nodes.items()
        if not node.stage.gives_weights and not node.stage.takes_every_stage
    ]
    needed = given.union(*(with_feeders(name) for name in ends))
    return tuple(name for name in recipe.stages if name in needed or all_stages()[name].takes_every_stage)
