"""Figures: what is grouped with what, and SVG that takes its colours from the page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitpipe.contracts.graph import all_stages, graph_of
from vitpipe.report.figures import (
    MAX_POINTS,
    PAPER,
    THEMED,
    _thinned,
    draw_confusion,
    draw_panel,
    draw_stage_curves,
    draw_times,
    inline_svg,
    panels,
    save_png,
)
from vitpipe.report.graph_drawing import ROW_HEIGHT, NodeText, draw_graph, essential_edges
from vitpipe.report.pictures import data_uri
from vitpipe.report.results import Curve, curves


def _curve(name: str, num_points: int = 3) -> Curve:
    return Curve("pretrain", name, tuple(range(num_points)), tuple(float(i + 1) for i in range(num_points)))


def test_train_and_val_share_a_panel_and_parts_of_the_loss_another(demo_run):
    found = panels({"run": curves(demo_run.artifacts["finetune"])})
    assert [p.title for p in found if not p.is_aside] == ["loss", "top1"]
    assert set(found[0].lines) == {"train", "val"}
    parts = panels({"run": curves(demo_run.artifacts["detect"])})
    assert set(parts[-1].lines | parts[-2].lines | parts[-3].lines) >= {"loss_cls", "loss_mask"}
    assert [p.title for p in parts if not p.is_aside] == ["loss"]


def test_several_runs_share_the_panels():
    found = panels({"seed 0": [_curve("train/loss")], "seed 1": [_curve("train/loss")]})
    assert [set(p.lines) for p in found] == [{"seed 0 · train", "seed 1 · train"}]


@given(st.integers(2, 3000))
def test_long_curves_keep_their_ends_and_only_logged_points(num_points):
    curve = _curve("loss", num_points)
    steps, values = _thinned(curve)
    assert len(steps) <= MAX_POINTS + 1
    assert (steps[0], steps[-1]) == (0, num_points - 1)
    assert all(value == step + 1 for step, value in zip(steps, values, strict=True))


def test_svg_is_well_formed_and_has_no_colour_of_its_own(demo_run):
    for panel in panels({'a & "b" <c>': curves(demo_run.artifacts["finetune"])}):
        text = inline_svg(draw_panel(panel, THEMED), f'{panel.title} & "quoted"')
        root = ET.fromstring(text)
        assert root.tag.endswith("svg")
        assert "var(--series-0)" in text
        assert not [colour for colour in (THEMED.ink, THEMED.muted, *THEMED.series) if colour in text]
        assert "width=" not in text[: text.index(">")]


def test_ids_of_two_figures_do_not_clash():
    panel = panels({"r": [_curve("train/loss")]})[0]
    texts = [inline_svg(draw_panel(panel, THEMED), label) for label in ("one", "two")]
    ids = [{e.get("id") for e in ET.fromstring(text).iter() if e.get("id")} for text in texts]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_confusion_matrix(demo_run):
    rows = demo_run.artifacts["evaluate"].tables()["confusion"]
    assert "var(--series-0)" in inline_svg(draw_confusion(rows, THEMED), "confusion")
    assert "digit 7" in inline_svg(
        draw_confusion(rows, THEMED, demo_run.class_names("evaluate")), "confusion"
    )
    assert draw_confusion([], THEMED) is None
    many = [{"true": str(i), "predicted": str(i), "images": "1"} for i in range(31)]
    assert draw_confusion(many, THEMED) is None


def test_pngs(tmp_path, demo_run):
    found = panels({"run": curves(demo_run.artifacts["finetune"])})
    path = save_png(draw_stage_curves(found[:2], PAPER), tmp_path / "sub" / "a.png")
    times = save_png(draw_times({"a": 1.0, "b": 2.0}, {"a": "1 s", "b": "2 s"}, PAPER), tmp_path / "b.png")
    for file in (path, times):
        with Image.open(file) as image:
            assert image.width > 400


def test_large_pictures_become_jpeg(tmp_path):
    small, large = tmp_path / "s.png", tmp_path / "l.png"
    Image.new("RGB", (8, 8)).save(small)
    Image.effect_noise((1400, 1000), 90).convert("RGB").save(large)
    assert data_uri(small).startswith("data:image/png;base64,")
    assert data_uri(large).startswith("data:image/jpeg;base64,")
    assert len(data_uri(large)) < 2 * large.stat().st_size


@given(st.sets(st.sampled_from([s.name for s in all_stages().values() if s.name != "prepare"])))
def test_the_graph_of_any_recipe_has_every_stage_once_and_no_two_in_one_place(names):
    nodes = graph_of({"prepare", *names})
    texts = {node.name: NodeText("1 s", 0.5, True) for node in nodes}
    drawn = draw_graph(nodes, texts)
    assert [row.name for row in drawn.rows] == [node.name for node in nodes]
    root = ET.fromstring(drawn.edges)
    dots = [float(dot.get("cy")) for dot in root.iter("circle")]
    assert dots == [ROW_HEIGHT * (i + 0.5) for i in range(len(nodes))], "one dot in the middle of each row"
    assert len(list(root.iter("path"))) == len(essential_edges(nodes))
    # Narrow enough to leave a phone's 390 pixels to the text, and nothing left of the picture.
    assert drawn.width < 130
    assert all(float(x) >= 0 for path in root.iter("path") for x in re.findall(r"H([\d.-]+)", path.get("d")))
    # Every stage can still be reached from those that feed it.
    follows: dict[str, set[str]] = {}
    for a, b in essential_edges(nodes):
        follows.setdefault(a, set()).add(b)

    def reach(name: str) -> set[str]:
        return {x for n in follows.get(name, ()) for x in (n, *reach(n))}

    assert all(node.name in reach(feeder) for node in nodes for feeder in node.inputs.values())


def test_axes_of_the_confusion_matrix_are_named(demo_run):
    drawn = draw_confusion(demo_run.artifacts["evaluate"].tables()["confusion"], PAPER)
    assert (drawn.axes[0].get_xlabel(), drawn.axes[0].get_ylabel()) == ("predicted", "true")
