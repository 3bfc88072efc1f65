"""RevCol compared with recorded outputs of its released code: the same weights and input."""

from __future__ import annotations

import importlib.util
import json
import zlib
from pathlib import Path

import pytest
import torch
from revcol_official import load_official, official_state

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.contracts.channel_statistics import IMAGENET_MEAN, IMAGENET_STD
from vitpipe.contracts.errors import InputError
from vitpipe.methods.intermediate_supervision.method import compound_loss, head_losses, head_weights
from vitpipe.models.revcol.heads import RevColHeads
from vitpipe.models.revcol.revcol import SHAPES, ConvColumn, RevCol
from vitpipe.models.reversible import clamp_scales

GOLDEN = Path(__file__).parents[2] / "golden"
ENTRIES = json.loads((GOLDEN / "revcolv2.json").read_text())["entries"]
TOLERANCE = 1e-4
IN_22K = 21841


def _module(path):
    spec = importlib.util.spec_from_file_location("golden_fill", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILL = _module(GOLDEN / "fill.py")


def _entries(kind):
    found = [entry for entry in ENTRIES if entry["kind"] == kind]
    return pytest.mark.parametrize(
        "entry", found, ids=[f"{entry.get('model')}-{entry.get('fill_rule')}" for entry in found]
    )


def _filled(entry, state):
    """A state filled by name and then by the rule that the entry names."""
    with torch.no_grad():
        state = FILL.fill(state)
        for key, tensor in state.items():
            last = key.split(".")[-1]
            if last == "gamma":
                tensor.fill_(0.2)
            if last.startswith("alpha"):
                tensor.fill_(0.5)
                if entry["fill_rule"] != "constant":
                    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
                if entry["fill_rule"] == "signed":
                    tensor[:, 1::2] *= -1
    return state


def _build(entry):
    """The network with its recorded weights."""
    model = RevCol(SHAPES[entry["model"]], entry.get("num_classes", 1000)).eval()
    model.load_state_dict(_filled(entry, model.state_dict()))
    return model


def _probe(entry):
    return FILL.probe(tuple(entry["input"]["shape"]), entry["input"]["seed"])


def _error(ours, recorded):
    """Largest difference of a digest, relative to its largest recorded value."""
    digest = FILL.digest(ours)
    assert digest["shape"] == recorded["shape"]
    pairs = [*zip(digest["values"], recorded["values"], strict=True)]
    pairs += [(digest[name], recorded[name]) for name in ("mean", "std")]
    scale = max(abs(value) for value in recorded["values"])
    return max(abs(a - b) for a, b in pairs) / max(scale, recorded["std"])


@_entries("features")
@torch.no_grad()
def test_features_and_logits(entry):
    model, images = _build(entry), _probe(entry)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["params"]
    last = entry["num_subnet"]
    columns = dict(zip(("0", str(last - 1)), model.run_columns(images, [1, last]), strict=True))
    assert set(columns) == set(entry["columns"])
    errors = {"stem": _error(model.stem(images), entry["stem"])}
    for name, recorded in entry["columns"].items():
        pairs = zip(columns[name], recorded, strict=True)
        errors |= {f"{name}.{level}": _error(*pair) for level, pair in enumerate(pairs)}
    errors["logits"] = _error(model(images), entry["logits"])
    print(entry["model"], entry["fill_rule"], {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("mode", ["plain", "column", "reversible"])
@_entries("gradients")
def test_gradients(entry, mode, monkeypatch):
    model, images = _build(entry), _probe(entry).requires_grad_()
    # Not by the policy: one of 2,880 random scales is small enough for it to choose another mode.
    monkeypatch.setattr(model.memory, "prepare", lambda *_, **__: mode)
    logits = model(images)
    loss = (logits * FILL.probe(tuple(logits.shape), 1)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], rel=1e-5)
    assert _error(images.grad, entry["input_grad"]) < TOLERANCE
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(grads) == set(entry["grad_norms"])
    norms, digests = {}, {}
    for name, recorded in entry["grad_norms"].items():
        if recorded == 0:
            # The first column's alphas scale nothing.
            assert grads[name] is None
            continue
        norms[name] = abs(grads[name].norm().item() - recorded) / recorded
    for name, recorded in entry["grads"].items():
        if grads[name] is not None:
            digests[name] = _error(grads[name], recorded)
    print(entry["model"], entry["fill_rule"], mode, f"loss {abs(loss.item() - entry['loss']):.1e}",
          f"input {_error(images.grad, entry['input_grad']):.1e}",
          f"norms {max(norms.values()):.1e} digests {max(digests.values()):.1e}")  # fmt: skip
    assert max(norms.values()) < 1e-4
    assert max(digests.values()) < 1e-3


@_entries("intermediate_supervision")
@torch.no_grad()
def test_intermediate_heads_and_their_loss(entry):
    shape, images = SHAPES[entry["model"]], _probe(entry)
    model, heads = RevCol(shape, 1000).eval(), RevColHeads(shape, 1000).eval()
    state = official_state(model, heads)
    load_official(model, heads, _filled(entry, state))
    assert sum(p.numel() for p in (*model.parameters(), *heads.parameters())) == entry["params"]
    outputs = heads(model, images)
    errors = [_error(*pair) for pair in zip(outputs.logits, entry["cls"], strict=True)]
    errors += [_error(*pair) for pair in zip(outputs.images, entry["decoder"], strict=True)]
    print("heads", f"{max(errors):.1e}")
    assert max(errors) < TOLERANCE
    torch.testing.assert_close(model(images), outputs.logits[-1])
    recorded = entry["compound_loss"]
    target = torch.tensor([7 * index for index in range(len(images))])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (images * std + mean).clamp(0.01, 0.99)
    losses = head_losses(outputs, pixels, torch.nn.functional.one_hot(target, 1000).float())
    weights = head_weights(4, 3.0, 0.7)
    # Recorded per head: its image and its classes together, and the last classifier alone.
    of_pixels, of_classes = ([w * float(x) for x, w in zip(*pair, strict=True)]
                             for pair in zip(losses, weights, strict=True))  # fmt: skip
    parts = [*(a + b for a, b in zip(of_pixels, of_classes[:-1], strict=True)), of_classes[-1]]
    assert parts == pytest.approx(recorded["parts"], rel=1e-5)
    assert compound_loss(losses, weights).item() == pytest.approx(recorded["total"], rel=1e-5)


@_entries("layer_decay")
def test_layer_ids(entry):
    with torch.device("meta"):
        model = RevCol(SHAPES[entry["model"]])
    known = dict(model.named_parameters())
    assert model.num_layers == entry["largest_exponent"] + 1
    for name, (exponent, decayed) in entry["entries"].items():
        assert model.num_layers - 1 - model.layer_of(name) == exponent, name
        assert (known[name].ndim > 1) == decayed, name
    assert {model.layer_of(name) for name in known} == set(range(model.num_layers))


@_entries("alpha_clamp")
def test_clamp(entry):
    column = ConvColumn(SHAPES["revcol_micro"], is_first=False, drop_path=0.0)
    given = torch.tensor([*entry["input"], -0.0, *[1.0] * 7])
    with torch.no_grad():
        column.alpha0.copy_(given.view(1, 16, 1, 1))
    clamp_scales([column])
    released = torch.tensor([*entry["official_output"], 0.0, *[1.0] * 7])
    expected = torch.where(released == 0, entry["bound"], released)
    torch.testing.assert_close(column.alpha0.flatten(), expected, rtol=0, atol=0)


@_entries("cost")
def test_costs(entry):
    cost = measure_cost(lambda: RevCol(SHAPES[entry["model"]]), entry["resolution"])
    assert cost.macs / 1e9 == pytest.approx(entry["gmacs"], abs=1e-9)
    assert cost.params == entry["params_without_intermediate_heads"]


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("keys/revcol_*.json")), ids=lambda file: file.stem)
def test_names_and_shapes_of_released_weights(file):
    recorded = json.loads(file.read_text())
    size = "_".join(file.stem.split("_")[:2])
    heads = "cls_blocks.0.classifier.1.bias" in recorded
    num_classes = recorded["cls_blocks.0.classifier.1.bias" if heads else "cls.classifier.1.bias"][0]
    assert num_classes in (1000, IN_22K)
    with torch.device("meta"):
        model = RevCol(SHAPES[size], num_classes)
        state = official_state(model, RevColHeads(SHAPES[size], num_classes)) if heads else model.state_dict()
    ours = {name: list(tensor.shape) for name, tensor in state.items()}
    assert ours == recorded


def test_bad_input():
    micro = SHAPES["revcol_micro"]
    with pytest.raises(InputError, match="48 x 64"):
        RevCol(micro, 10)(torch.zeros(1, 3, 48, 64))
    with pytest.raises(InputError, match="0 columns"):
        RevCol(type(micro)("none", micro.widths, micro.depths, num_columns=0), 10)
    with pytest.raises(InputError, match="needs 4 columns"):
        RevColHeads(micro, 10)
