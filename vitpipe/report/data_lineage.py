"""Origin of a run's data: one row per dataset, from the output of its prepare stage.

tables/splits.csv, tables/sources.csv     counts, bytes, digests; source format, encoding, location, revision
SET/findings.csv                          all irregular images; tables/findings.csv has the first ones only
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.units import format_bytes, format_count
from vitpipe.data.manifest import FINDINGS
from vitpipe.datasets.catalogue import FACTS, facts
from vitpipe.report.result_tables import ShownTable
from vitpipe.report.results import RunResults

_DIGEST_DIGITS = 12  # as many as the page shows of every digest
_COLUMNS = (
    ("dataset", False), ("source format", False), ("train", True), ("val", True), ("classes", True),
    ("size", True), ("irregular images", False), ("encoding", False), ("stored in", False), ("digest", False),
)  # fmt: skip
# Columns of tables/sources.csv that describe one dataset; all others come from its origin as a whole.
_OF_ONE_SET = {"dataset", "form", "encoding", "kept_in", "notes", "digest"}
_TREATMENTS = ("left out", "converted", "kept")
_MAX_PICTURES = 4  # each may add 0.9 MB to the page

Row = Mapping[str, str]


def lineage_table(run: RunResults) -> ShownTable | None:
    """One row per prepared dataset; columns that are empty in every row are omitted. None without data.

    The size of a dense dataset that stays in the user's folder is the size of that folder.
    """
    prepared = run.artifacts.get("prepare")
    tables = prepared.tables() if prepared else {}
    if prepared is None or not tables.get("splits"):
        return None
    sources = {row["dataset"]: row for row in tables.get("sources", [])}
    names = dict.fromkeys(row["dataset"] for row in tables["splits"])
    rows = [
        _set_row(
            name,
            [row for row in tables["splits"] if row["dataset"] == name],
            sources.get(name, {}),
            _odd_images(prepared, name, tables.get("findings", [])),
            is_dense=_is_dense(name, run),
        )
        for name in names
    ]
    # Runs of earlier versions have no sources.csv, so their rows have fewer values.
    used = [column for column in range(len(_COLUMNS)) if any(row[column] not in ("", "—") for row in rows)]
    return ShownTable(
        name="lineage",
        title="Datasets",
        columns=tuple(_COLUMNS[column][0] for column in used),
        numeric=tuple(_COLUMNS[column][1] for column in used),
        rows=tuple(tuple(row[column] for column in used) for row in rows),
    )


def lineage_facts(run: RunResults) -> list[tuple[str, str]]:
    """(name, value) of the facts common to all datasets: source, digest, revisions of data and code."""
    prepared, data = run.artifacts.get("prepare"), run.recipe.data
    if prepared is None:
        return []
    found = {"source": data.source, "digest": prepared.card.data_digest[:_DIGEST_DIGITS]}
    if data.source == "pinned" and data.pinned is not None:
        found["pinned revision"] = f"{data.pinned.path} at {data.pinned.revision} of {data.pinned.repo}"
    found |= _revisions(prepared.tables().get("sources", []))
    # Not in the table: the commit moves with every commit of other files in the repository of the raw data.
    commits = {revision.get("dvc_commit", "") for revision in prepared.run.data_revisions.values()}
    found |= {"dvc commit": commits.pop()} if len(commits) == 1 else {}
    found |= _tracked(run, prepared.card.data_digest)
    # The record has COMMIT+changes when code files of the checkout had uncommitted changes.
    commit, _, changes = prepared.run.git_commit.partition("+")
    found["code"] = (
        f"git {commit[:_DIGEST_DIGITS]}{' with uncommitted changes' if changes else ''}" if commit else ""
    )
    found["prepared"] = prepared.run.started_at.replace("T", " ").replace("+00:00", " UTC")
    return [(name, value) for name, value in found.items() if value]


def lineage_notes(run: RunResults) -> list[str]:
    """Notes of the data sources: held-out images, class order, order of images."""
    prepared = run.artifacts.get("prepare")
    rows = prepared.tables().get("sources", []) if prepared else []
    return [f"{row['dataset']}: {row['notes']}" for row in rows if row.get("notes")]


def terms_table(run: RunResults) -> ShownTable | None:
    """Licence and citation of every real dataset that was prepared; None for embedded data."""
    prepared = run.artifacts.get("prepare")
    if prepared is None or run.recipe.data.source == "embedded":
        return None
    names = dict.fromkeys(row["dataset"] for row in prepared.tables().get("splits", []))
    rows = tuple(
        (FACTS[name].title, FACTS[name].licence, str(FACTS[name].citation or ""), FACTS[name].home)
        for name in names
        if name in FACTS
    )
    if not rows:
        return None
    columns = ("dataset", "licence", "citation", "website")
    return ShownTable("terms", "Licences and citations", columns, (False,) * 4, rows)


def duplicate_pictures(prepared: Artifact) -> list[tuple[str, Path]]:
    """(title, PNG) of the near duplicates of each dataset, where the search found any."""
    files = sorted(prepared.path.glob("*/near_duplicates.png"))[:_MAX_PICTURES]
    return [
        (f"near duplicates of {file.parent.name}: validation (left), training (right)", file)
        for file in files
    ]


def _is_dense(name: str, run: RunResults) -> bool:
    """Whether a set was verified as a whole and left in its own layout."""
    # A set of a plugin that is no longer there: most sets are images with classes.
    known = name in FACTS or name in run.recipe.data.own_sets
    return known and not facts(name, run.recipe.data).has_classes


def _set_row(
    name: str, splits: Sequence[Row], source: Row, odd_images: str, *, is_dense: bool
) -> tuple[str, ...]:
    by_split = {row.get("split", ""): row for row in splits}
    # `num_bytes` is the column's name in tables of earlier versions.
    sizes = [_whole(row.get("size_bytes") or row.get("num_bytes")) for row in splits]
    # Both rows of a dense dataset give the size of the one folder that holds both splits.
    size = max(sizes) if is_dense else sum(sizes)
    num_classes = max(_whole(row.get("num_classes")) for row in splits)
    digest = source.get("digest") or splits[0].get("digest") or ""
    return (
        name,
        source.get("form") or "",
        *(_count(by_split.get(split, {}).get("num_images")) for split in ("train", "val")),
        format_count(num_classes) if num_classes else "—",
        format_bytes(size) if size else "—",
        "—" if is_dense else odd_images,
        source.get("encoding") or "",
        source.get("kept_in") or "",
        digest[:_DIGEST_DIGITS],
    )


def _odd_images(prepared: Artifact, name: str, shown: Iterable[Row]) -> str:
    """`1 left out; 3 kept (2 CMYK, 1 palette)`."""
    path = prepared.path / name / FINDINGS
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            counts = Counter((row["treatment"], row["finding"]) for row in csv.DictReader(file))
    else:
        rows = [row for row in shown if row["dataset"] == name]
        counts = Counter((row["treatment"], row["finding"]) for row in rows)
    texts = []
    for treatment in _TREATMENTS:
        kinds = Counter({kind: number for (what, kind), number in counts.items() if what == treatment})
        if kinds:
            # Images are left out because they are damaged, each with a message of its own: too long for a
            # cell.
            named = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
            texts.append(
                f"{kinds.total():,} {treatment}" + (f" ({named})" if treatment != "left out" else "")
            )
    return "; ".join(texts) or "none"


def _revisions(sources: Sequence[Row]) -> dict[str, str]:
    """Columns with the same value for every dataset: DVC revision, git commit, remote."""
    found = {}
    for column in sources[0] if sources else ():
        values = {row[column] for row in sources}
        if column not in _OF_ONE_SET and len(values) == 1:
            found[column.replace("_", " ")] = values.pop()
    return found


def _tracked(run: RunResults, data_digest: str) -> dict[str, str]:
    """DVC's digest of the prepared folder."""
    # DVC computes it after the prepare stage has ended, so it is on the cards of the stages that read the
    # data.
    for artifact in run.artifacts.values():
        revision = artifact.run.data_revisions.get("prepared", {})
        if revision and artifact.card.data_digest == data_digest:
            return {"DVC": revision["dvc_md5"][:_DIGEST_DIGITS]}
    return {}


def _whole(text: str | None) -> int:
    return int(float(text)) if text else 0


def _count(text: str | None) -> str:
    return format_count(_whole(text)) if text else "—"
