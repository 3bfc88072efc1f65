"""Where the data of a run comes from: one row per set, from the tables and lists of its prepare stage.

tables/splits.csv, tables/sources.csv     counts, bytes, digests; form, encoding, place, revision
SET/findings.csv                          odd images; else the shorter tables/findings.csv
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vitpipe.config.data import DENSE_SETS
from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.units import format_bytes
from vitpipe.data.manifest import FINDINGS
from vitpipe.datasets.catalogue import FACTS
from vitpipe.report.result_tables import ShownTable
from vitpipe.report.results import RunResults

_DIGEST_DIGITS = 12
_COLUMNS = (
    ("set", False), ("packed from", False), ("train", True), ("val", True), ("classes", True), ("size", True),
    ("odd images", False), ("pixels", False), ("kept in", False), ("digest", False),
)  # fmt: skip
_OF_ONE_SET = {"dataset", "form", "encoding", "kept_in", "notes", "digest"}
_TREATMENTS = ("left out", "converted", "kept")
_MOST_PICTURES = 4

Row = Mapping[str, str]


def lineage_table(run: RunResults) -> ShownTable | None:
    """One row per prepared set; columns that say nothing in any row are left out. None without data.

    Sizes of dense sets that stay in the user's folder are those of that folder.
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
        )
        for name in names
    ]
    used = [column for column in range(len(_COLUMNS)) if any(row[column] not in ("", "—") for row in rows)]
    return ShownTable(
        name="lineage",
        title="Sets",
        columns=tuple(_COLUMNS[column][0] for column in used),
        numeric=tuple(_COLUMNS[column][1] for column in used),
        rows=tuple(tuple(row[column] for column in used) for row in rows),
    )


def lineage_facts(run: RunResults) -> list[tuple[str, str]]:
    """(name, value) of what holds for all sets: source, digest, pinned revision, git and DVC revision."""
    prepared, data = run.artifacts.get("prepare"), run.recipe.data
    if prepared is None:
        return []
    found = {"source": data.source, "digest": prepared.card.data_digest[:_DIGEST_DIGITS]}
    if data.source == "pinned" and data.pinned is not None:
        found["pinned"] = f"{data.pinned.path} at {data.pinned.revision} of {data.pinned.repo}"
    found |= _revisions(prepared.tables().get("sources", []))
    found |= _tracked(run, prepared.card.data_digest)
    commit, _, changes = prepared.card.git_commit.partition("+")
    found["code"] = f"git {commit[:_DIGEST_DIGITS]}{' with changes' if changes else ''}" if commit else ""
    found["prepared"] = prepared.card.started_at.replace("T", " ").replace("+00:00", " UTC")
    return [(name, value) for name, value in found.items() if value]


def lineage_notes(run: RunResults) -> list[str]:
    """What the sources of the sets said: held-out images, class order, order of images."""
    prepared = run.artifacts.get("prepare")
    rows = prepared.tables().get("sources", []) if prepared else []
    return [f"{row['dataset']}: {row['notes']}" for row in rows if row.get("notes")]


def terms_table(run: RunResults) -> ShownTable | None:
    """Licence and citation of every real set that was prepared; None for embedded data."""
    prepared = run.artifacts.get("prepare")
    if prepared is None or run.recipe.data.source == "embedded":
        return None
    names = dict.fromkeys(row["dataset"] for row in prepared.tables().get("splits", []))
    rows = tuple(
        (FACTS[name].title, FACTS[name].licence, str(FACTS[name].citation), FACTS[name].home)
        for name in names
        if name in FACTS
    )
    if not rows:
        return None
    return ShownTable("terms", "Terms and citations", ("set", "terms", "cite", "home"), (False,) * 4, rows)


def duplicate_pictures(prepared: Artifact) -> list[tuple[str, Path]]:
    """(title, PNG) of the near duplicates of each set, where they were looked for and found."""
    files = sorted(prepared.path.glob("*/near_duplicates.png"))[:_MOST_PICTURES]
    return [(f"near duplicates of {file.parent.name}, val beside train", file) for file in files]


def _set_row(name: str, splits: Sequence[Row], source: Row, odd_images: str) -> tuple[str, ...]:
    by_split = {row.get("split", ""): row for row in splits}
    sizes = [_whole(row.get("size_bytes") or row.get("num_bytes")) for row in splits]
    # Both rows of a dense set name the one archive that holds both splits.
    size = max(sizes) if name in DENSE_SETS else sum(sizes)
    num_classes = max(_whole(row.get("num_classes")) for row in splits)
    digest = source.get("digest") or splits[0].get("digest") or ""
    return (
        name,
        source.get("form") or "",
        *(_count(by_split.get(split, {}).get("num_images")) for split in ("train", "val")),
        f"{num_classes:,}" if num_classes else "—",
        format_bytes(size) if size else "—",
        odd_images,
        source.get("encoding") or "",
        source.get("kept_in") or "",
        digest[:_DIGEST_DIGITS],
    )


def _odd_images(prepared: Artifact, name: str, shown: Iterable[Row]) -> str:
    """`1 left out; 3 kept (2 CMYK, 1 palette)`; an em dash where images were not looked at one by one."""
    if name in DENSE_SETS:
        return "—"
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
            # Every damaged file has an error of its own; the list names them.
            named = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
            texts.append(
                f"{kinds.total():,} {treatment}" + (f" ({named})" if treatment != "left out" else "")
            )
    return "; ".join(texts) or "none"


def _revisions(sources: Sequence[Row]) -> dict[str, str]:
    """Columns that the prepare stage added to every set alike: DVC revision, git commit, remote."""
    found = {}
    for column in sources[0] if sources else ():
        values = {row[column] for row in sources}
        if column not in _OF_ONE_SET and len(values) == 1:
            found[column.replace("_", " ")] = values.pop()
    return found


def _tracked(run: RunResults, data_digest: str) -> dict[str, str]:
    """DVC's digest of the prepared folder, which it knows after the stage: the stages that read it tell."""
    for artifact in run.artifacts.values():
        revision = artifact.card.data_revisions.get("prepared", {})
        if revision and artifact.card.data_digest == data_digest:
            return {"DVC": revision["dvc_md5"][:_DIGEST_DIGITS]}
    return {}


def _whole(text: str | None) -> int:
    return int(float(text)) if text else 0


def _count(text: str | None) -> str:
    return f"{_whole(text):,}" if text else "—"
