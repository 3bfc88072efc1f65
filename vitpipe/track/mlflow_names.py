"""What MLflow takes: names, lengths, kinds of places."""

from __future__ import annotations

import re

from vitpipe.track.outbox import Origin

PREFIX = "vitpipe."
LONGEST_PARAM, LONGEST_TAG = 6000, 8000
LONGEST_DATASET_NAME, LONGEST_DIGEST = 500, 36


def metric_name(name: str) -> str:
    """A name of a metric or a parameter: letters, digits, `_ - . / :` and spaces."""
    return re.sub(r"[^\w\-. /:]", "_", name)[:250]


def place_of(source: str) -> tuple[str, dict[str, str]]:
    """MLflow's kind of a place, and the place as that kind is written; its page links to what it can open."""
    scheme = source.partition("://")[0] if "://" in source else ""
    if scheme in ("http", "https"):
        return "http", {"url": source}
    return (scheme or "local"), {"uri": source}


def stage_tags(origin: Origin) -> dict[str, str]:
    """The tags of a stage's run."""
    tags = {PREFIX + key: value for key, value in origin.tags.items()}
    tags |= {f"{PREFIX}pipeline": origin.pipeline, f"{PREFIX}role": "stage", f"{PREFIX}stage": origin.stage}
    if "git_commit" in origin.tags:
        tags["mlflow.source.git.commit"] = origin.tags["git_commit"].partition("+")[0]
    return tags
