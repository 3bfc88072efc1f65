"""Names of classes are text: no formula, no HTML, no Markdown; and a figure that fails costs only itself."""

from __future__ import annotations

import html
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitpipe.config.read import load_recipe
from vitpipe.report import figures
from vitpipe.report.result_tables import markdown_text
from vitpipe.report.results import Curve
from vitpipe.report.write_report import build_report

HOSTILE = [
    "cost $^{_$", "$\\frac{1}$ a $", "<script>alert(1)</script>", "<img src=x onerror=y>", "a|b", "[a](javascript:x)",
    "**bold**", "`code`", "_hidden", "tab\tand\x07bell",
]  # fmt: skip


TABLES = {
    ("prepare", "classes"): [
        {"dataset": "imagenet", "class": str(number), "name": name} for number, name in enumerate(HOSTILE)
    ],
    ("evaluate", "per_class"): [{"class": name, "images": 4, "top1": 0.5, "top5": ""} for name in HOSTILE],
    ("evaluate", "confusion"): [{"true": name, "predicted": name, "images": 4} for name in HOSTILE],
}


def test_the_report_shows_them_as_they_are(make_run, tmp_path):
    run = make_run(tmp_path / "run", load_recipe("itpn/pixel_base", "demo"), TABLES)
    report = build_report([run], tmp_path / "out")
    page, text = report.html.read_text(), report.markdown.read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert html.escape("<img src=x onerror=y>") in page
    assert "not drawn" not in page
    for markup in ("<script", "<img", "[a](javascript", "| **bold** |"):
        assert markup not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "Confusion matrix of evaluate" in report.figures
    assert "not drawn" not in text


def test_a_figure_that_cannot_be_drawn_costs_only_itself(make_run, tmp_path):
    broken = {("evaluate", "confusion"): [{"true": "a", "predicted": "a", "images": "many"}]}
    run = make_run(tmp_path / "run", load_recipe("itpn/pixel_base", "demo"), broken)
    report = build_report([run], tmp_path / "out")
    assert "evaluate confusion matrix: not drawn (ValueError" in report.html.read_text()
    assert "The figure confusion_evaluate was not drawn (ValueError" in report.markdown.read_text()
    assert "Time per stage" in report.figures


@pytest.mark.parametrize("name", HOSTILE)
def test_figures_draw_any_name(name, tmp_path):
    rows = [{"true": name, "predicted": name, "images": "3"}]
    ET.fromstring(figures.inline_svg(figures.draw_confusion(rows, figures.THEMED), "confusion"))
    curve = Curve("pretrain", "train/loss", (1, 2), (1.0, 0.5))
    panel = figures.Panel("pretrain", "loss", {name: curve, f"{name} 2": curve})
    drawn = figures.inline_svg(figures.draw_panel(panel, figures.THEMED), "loss")
    texts = [
        "".join(element.itertext()).strip()
        for element in ET.fromstring(drawn).iter()
        if element.tag.endswith("text")
    ]
    shown = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)
    assert shown in texts


@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_text_starts_html_or_markup_in_markdown(text):
    found = markdown_text(text)
    assert "<" not in found
    assert ">" not in found
    for sign in "*`[]$~":
        assert found.count(sign) == found.count("\\" + sign)
    assert "\n" not in found
