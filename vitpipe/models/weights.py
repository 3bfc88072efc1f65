"""Weights in and out of files, with an account of every key.

A stage writes `weights.safetensors`; the next one takes from it what its own network has. Nothing is dropped,
resized or started afresh in silence: `LoadReport` has a row for every key of the file and of the network, and
what no rule allows is a `CheckpointError` that names the keys.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitpipe.errors import CheckpointError, disk_errors
from vitpipe.models.hivit import SHAPES, UNIT_PIXELS, HiViTClassifier
from vitpipe.models.itpn import MaskedPretrainer
from vitpipe.models.positions import resample_positions, resize_relative_table
from vitpipe.models.pyramid import PyramidBackbone

Outcome = Literal["matched", "renamed", "resized", "missing", "fresh", "unused", "dropped"]
WeightsKind = Literal["pretrain", "classifier", "pyramid"]
_MAX_NAMED = 6


@dataclass(frozen=True)
class KeyRow:
    """What happened to one key.

    Attributes:
        source: key in the file; empty when the file does not have it.
        target: key in the network; empty when the network does not have it.
        shape: of the tensor in the network, or in the file if it is not in the network.
        outcome: `missing`, `fresh`: the network keeps its start value. `unused`, `dropped`: left in the file.
        why: the reason, empty for plain matches.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class LoadReport:
    """The account: one row per key of the file and of the network."""

    where: str
    rows: tuple[KeyRow, ...]

    def count(self, outcome: Outcome) -> int:
        """Number of rows with this outcome."""
        return sum(row.outcome == outcome for row in self.rows)

    def summary(self) -> str:
        """One line: how many of each outcome, and each reason once."""
        counts = Counter(row.outcome for row in self.rows)
        reasons = Counter((row.outcome, row.why) for row in self.rows if row.why)
        parts = [f"{count} {outcome}" for outcome, count in counts.items()]
        notes = [f"{count} {outcome}: {why}" for (outcome, why), count in reasons.items()]
        return ", ".join(parts) + (f" ({'; '.join(notes)})" if notes else "")

    def table(self) -> list[dict[str, str]]:
        """Rows as text, for a CSV file or a terminal."""
        return [
            {
                **{name: str(value) for name, value in asdict(row).items()},
                "shape": "x".join(map(str, row.shape)) or "scalar",
            }
            for row in self.rows
        ]


@dataclass(frozen=True)
class Rule:
    """What may happen to the keys that match `pattern` (a regular expression, searched), and why.

    `missing`: the file may lack a key; the network keeps its start value.
    `fresh`: the file may have another shape; the network keeps its start value.
    `unused`: the file may have a key that the network does not.
    `resized`: a position table may be resampled to the network's grid.
    """

    outcome: Literal["missing", "fresh", "unused", "resized"]
    pattern: str
    why: str


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file is for, read from its keys and shapes.

    Attributes:
        kind: `pretrain` (backbone, pyramid, decoder), `classifier`, or `pyramid` (backbone, pyramid).
        model: name in the registry; empty when the sizes are those of no registered network.
        image_size: pixels per side that the absolute position table is made for; 0 without a table.
        num_classes: of a classifier, else 0.
        pyramid_width, pyramid_depth: 0 without a pyramid.
    """

    kind: WeightsKind
    model: str
    image_size: int
    relative_position: bool
    num_classes: int
    pyramid_width: int
    pyramid_depth: int


def save_weights(
    model_or_state: nn.Module | Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights as safetensors; the file appears complete or not at all.

    Raises:
        StorageError: when the disk refuses.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        try:
            save_file(tensors, partial, metadata=dict(metadata or {}))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU.

    Raises:
        CheckpointError: when it is missing, truncated or no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def load_metadata(path: Path) -> dict[str, str]:
    """The text entries that were saved beside the tensors.

    Raises:
        CheckpointError: as `load_state`.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def _opened(path: Path) -> safe_open:
    if not path.is_file():
        raise CheckpointError(
            "The weights file does not exist",
            where=path,
            mend="check the path, or run the stage that makes it",
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ").splitlines()[0]
        raise CheckpointError(
            f"The weights file is truncated or is no safetensors file ({reason})",
            where=path,
            mend="copy or make it again; turn an official .pth checkpoint into safetensors with "
            "`vitpipe convert`",
        ) from error


def describe(state: Mapping[str, Tensor], where: str | Path = "") -> WeightsInfo:
    """Say what these weights are.

    Raises:
        CheckpointError: when they are not from one of our networks.
    """
    stem = state.get("backbone.stem.proj.weight")
    if stem is None:
        raise CheckpointError(
            f"The weights are not from a vitpipe network (first keys: {', '.join(sorted(state)[:3])})",
            where=where,
            mend="give a stage's weights.safetensors, or an official checkpoint after `vitpipe convert`",
        )
    depths = tuple(_num_blocks(state, f"backbone.stage{stride}.") for stride in (4, 8, 16))
    model = next((s.name for s in SHAPES.values() if (s.depths, s.widths[0]) == (depths, stem.shape[0])), "")
    position, head = state.get("backbone.absolute_position"), state.get("head.weight")
    lateral = state.get("pyramid.lateral8.weight")
    kind: WeightsKind = "pyramid" if lateral is not None else "classifier"
    return WeightsInfo(
        kind="pretrain" if "decoder.mask_token" in state else kind,
        model=model,
        image_size=0 if position is None else math.isqrt(position.shape[1]) * UNIT_PIXELS,
        relative_position="backbone.stage16.0.attn.relative_table" in state,
        num_classes=0 if head is None else head.shape[0],
        pyramid_width=0 if lateral is None else lateral.shape[0],
        pyramid_depth=_num_blocks(state, "pyramid.fuse8."),
    )


def _num_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], *, rules: Sequence[Rule] = (), where: str | Path = ""
) -> LoadReport:
    """Copy weights into a network; without rules, names and shapes must be the same.

    The network is changed only if everything is allowed.

    Args:
        where: what to call the file in messages and in the report.

    Raises:
        CheckpointError: when a key is missing, unused or of another shape and no rule allows it.
    """
    rows: list[KeyRow] = []
    problems: list[str] = []
    new: list[tuple[Tensor, Tensor]] = []
    target = model.state_dict()
    for name, tensor in target.items():
        shape = tuple(tensor.shape)
        given = state.get(name)
        if given is None:
            if (why := _allowed(rules, "missing", name)) is not None:
                rows.append(KeyRow("", name, shape, "missing", why))
            else:
                problems.append(f"{name} is not in the file")
        elif given.shape == tensor.shape:
            new.append((tensor, given))
            rows.append(KeyRow(name, name, shape, "matched"))
        elif (why := _allowed(rules, "resized", name)) is not None and _is_other_grid(given, tensor):
            new.append((tensor, _resized(name, given, tensor)))
            rows.append(KeyRow(name, name, shape, "resized", f"{why}, from {tuple(given.shape)}"))
        elif (why := _allowed(rules, "fresh", name)) is not None:
            rows.append(KeyRow(name, name, shape, "fresh", f"{why}, {tuple(given.shape)} in the file"))
        else:
            problems.append(f"{name} has shape {tuple(given.shape)} in the file, {shape} in the network")
    for name in sorted(set(state) - set(target)):
        unused = _allowed(rules, "unused", name)
        if unused is None:
            problems.append(f"{name} of the file is not in the network")
        else:
            rows.append(KeyRow(name, "", tuple(state[name].shape), "unused", unused))
    if problems:
        raise _does_not_fit(problems, state, where)
    with torch.no_grad():
        for tensor, given in new:
            tensor.copy_(given)
    return LoadReport(str(where), tuple(rows))


def _allowed(rules: Sequence[Rule], outcome: str, name: str) -> str | None:
    return next((r.why for r in rules if r.outcome == outcome and re.search(r.pattern, name)), None)


def _is_other_grid(given: Tensor, tensor: Tensor) -> bool:
    """Same channels or heads, for another square of units; anything else is another model."""
    same_columns = given.ndim == tensor.ndim and given.shape[-1] == tensor.shape[-1]
    return same_columns and math.isqrt(given.shape[-2]) ** 2 == given.shape[-2]


def _resized(name: str, given: Tensor, tensor: Tensor) -> Tensor:
    """A position table for the network's grid."""
    if name.endswith("relative_table"):
        return resize_relative_table(given.float(), tensor.shape[0])
    side = math.isqrt(tensor.shape[1])
    return resample_positions(given.float(), (side, side))


def _does_not_fit(problems: Sequence[str], state: Mapping[str, Tensor], where: str | Path) -> CheckpointError:
    more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
    mend = "use weights of the same model and stage, or change the recipe's model section to fit them"
    if "backbone.stem.proj.weight" in state:
        info = describe(state)
        mend += f"; the file holds a {info.kind} network of {info.model or 'no registered model'}"
        mend += f" for {info.image_size} pixels" if info.image_size else ""
    return CheckpointError(
        f"The weights do not fit the network: {'; '.join(problems[:_MAX_NAMED])}{more}",
        where=where,
        mend=mend,
    )


_RELATIVE = r"\.relative_table$"
_LATER_FUSE = r"^pyramid\.fuse[48]\.[1-9]"
_RESIZE = (
    Rule("resized", r"^backbone\.absolute_position$", "bicubic to the network's grid"),
    Rule("resized", _RELATIVE, "bicubic to the network's grid"),
)
_NO_RELATIVE_YET = Rule(
    "missing", _RELATIVE, "the file has no relative position bias; zero, which changes nothing"
)
_NEW_HEAD = Rule("missing", r"^head_norm\.|^head\.", "a new head")
_OTHER_CLASSES = Rule("fresh", r"^head\.", "another number of classes")
_NEW_PYRAMID = Rule("missing", r"^pyramid\.", "a classifier has no pyramid; it starts afresh")
_DEEPER_PYRAMID = Rule("missing", _LATER_FUSE, "the file's pyramid has fewer blocks; this one starts afresh")
_SHALLOWER_PYRAMID = Rule("unused", _LATER_FUSE, "this network's pyramid has fewer blocks")
_ONLY_PRETRAINING = Rule("unused", r"^decoder\.", "only pre-training has a decoder")
_ONLY_DENSE = Rule("unused", r"^pyramid\.", "a classifier has no pyramid")
_ONLY_CLASSIFIER = Rule("unused", r"^head_norm\.|^head\.", "dense features need no classification head")
_WITHOUT_RELATIVE = Rule("unused", _RELATIVE, "this task runs without relative positions")


def transfer_weights(model: nn.Module, path: Path) -> LoadReport:
    """Start a network from another stage's `weights.safetensors`.

    pretrain > classifier: new head; relative tables start at zero; pyramid and decoder stay behind.
    classifier > classifier: the head starts afresh when the number of classes differs.
    pretrain or pyramid > PyramidBackbone: the decoder stays behind; a pyramid of another depth keeps the
    blocks both have. classifier > PyramidBackbone: the pyramid starts afresh.
    pretrain > MaskedPretrainer: everything.
    Position tables are resized where the grid differs (never into pre-training).

    To load a file into the very same network (evaluation), use `load_into(model, load_state(path))`.

    Raises:
        CheckpointError: when the file cannot be read or does not fit; names the keys.
    """
    state = load_state(path)
    kind = describe(state, path).kind
    rules: tuple[Rule, ...] = ()
    if isinstance(model, HiViTClassifier):
        head = _OTHER_CLASSES if kind == "classifier" else _NEW_HEAD
        rules = (*_RESIZE, head, _NO_RELATIVE_YET, _ONLY_PRETRAINING, _ONLY_DENSE)
    elif isinstance(model, PyramidBackbone):
        pyramid = _NEW_PYRAMID if kind == "classifier" else _DEEPER_PYRAMID
        unused = (_SHALLOWER_PYRAMID, _ONLY_PRETRAINING, _ONLY_CLASSIFIER, _WITHOUT_RELATIVE)
        rules = (*_RESIZE, pyramid, _NO_RELATIVE_YET, *unused)
    elif not isinstance(model, MaskedPretrainer):
        raise TypeError(f"no transfer rules for {type(model).__name__}")
    return load_into(model, state, rules=rules, where=path)
