"""One rank of a tiny dense stage, started by torchrun: STAGE HEAD PREPARED OUT; its result is OUT/rankN.json."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from conftest import HEADS, TINY, prepare_card

from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.stages.context import StageContext
from vitpipe.train.ranks import joined


def main(stage: str, head: str, prepared: Path, out: Path) -> None:
    rank, num_ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    folder, state = out / f"folder{rank}", out / "state"
    folder.mkdir(parents=True)
    state.mkdir(exist_ok=True)
    recipe = load_recipe("itpn/pixel_base", "demo", (*TINY, *HEADS.get(head, ()), f"{stage}.global_batch=4"))
    data = {"data": Artifact(prepared, prepare_card(), {})}
    logger = MemoryLogger()
    with joined(rank, num_ranks, "cpu") as ranks:
        context = StageContext(stage, recipe, data, folder, state, logger, ranks)
        metrics = importlib.import_module(f"vitpipe.stages.{stage}.stage").run(context)
    losses = [(step, value) for step, name, value in logger.points if name == "train/loss"]
    files = sorted(path.name for path in folder.iterdir())
    (out / f"rank{rank}.json").write_text(json.dumps({"metrics": metrics, "losses": losses, "files": files}))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(Path, sys.argv[3:]))
