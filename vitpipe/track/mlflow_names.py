"""MLflow's limits on names and values, and the tags of a stage's run."""

from __future__ import annotations

import re

from vitpipe.track.outbox import Origin

PREFIX = "vitpipe."
# Limits in characters of mlflow/utils/validation.py (3.17): MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH,
# MAX_DATASET_NAME_SIZE, MAX_DATASET_DIGEST_SIZE. MLflow refuses a longer dataset name or digest.
MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 6000, 8000
MAX_DATASET_NAME_LENGTH, MAX_DIGEST_LENGTH = 500, 36


def metric_name(name: str) -> str:
    """Make a metric or parameter name valid: letters, digits, `_ - . / :`, spaces; 250 characters."""
    # MAX_ENTITY_KEY_LENGTH of mlflow/utils/validation.py is 250. One invalid name makes MLflow refuse the
    # whole batch, so other characters are replaced.
    return re.sub(r"[^\w\-. /:]", "_", name)[:250]


def dataset_source(source: str) -> tuple[str, dict[str, str]]:
    """Convert a path or URL into MLflow's source type and the fields of a source of that type."""
    # `mlflow.data.get_source` finds the class by the type: `HTTPDatasetSource` has the type "http" for https
    # too and the field `url`; artifact sources have the type "local" or their scheme (s3, gs, ...) and `uri`.
    scheme = source.partition("://")[0] if "://" in source else ""
    if scheme in ("http", "https"):
        return "http", {"url": source}
    return (scheme or "local"), {"uri": source}


def stage_tags(origin: Origin) -> dict[str, str]:
    """Tags of a stage's run."""
    links = {"git_branch": "mlflow.source.git.branch", "git_remote": "mlflow.source.git.repoURL"}
    tags = {links.get(key, PREFIX + key): value for key, value in origin.tags.items()}
    tags |= {f"{PREFIX}pipeline": origin.pipeline, f"{PREFIX}role": "stage", f"{PREFIX}stage": origin.stage}
    if "git_commit" in origin.tags:
        # `git_commit` ends in "+changes" for a modified checkout; MLflow's own tag holds a commit hash only.
        tags["mlflow.source.git.commit"] = origin.tags["git_commit"].partition("+")[0]
    return tags
