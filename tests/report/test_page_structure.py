"""The page serves a reader of five minutes: order, pictures that open large, nothing twice, whose is what."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vitpipe.config.read import load_recipe
from vitpipe.data.image_grid import Section, Tile, write_grid
from vitpipe.report.page import TEMPLATES
from vitpipe.report.result_tables import metric_label
from vitpipe.report.run_differences import difference_tables, results_side_by_side
from vitpipe.report.verdict_table import facts_by_rows, verdict_table
from vitpipe.report.write_report import build_report

VOID = {"meta", "img", "br", "link", "input", "hr"}
NOTE = "The first 4 validation images with objects. <b>Not</b> chosen by result."


class Elements(HTMLParser):
    """Every element in the order of the page: tag, attributes, tags and ids around it, its own text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict] = []
        self.open: list[dict] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "around": list(self.open), "text": "", **dict(attrs)}
        self.found.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.found.append({"tag": tag, "around": list(self.open), "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, class_=""):
        return [
            e
            for e in self.found
            if e["tag"] == tag and (not class_ or class_ in (e.get("class") or "").split())
        ]

    def inside(self, element, id_):
        return any(outer.get("id") == id_ for outer in element["around"])


def _texts(elements):
    return [" ".join(element["text"].split()) for element in elements]


@pytest.fixture(scope="module")
def picture_run(make_run, tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("pictures"), load_recipe("itpn/pixel_base", "demo"))
    tile = Tile(np.full((60, 90, 3), 7, np.uint8), "1 object")
    write_grid(run.artifacts["detect"].path / "predictions.png", [Section("", [tile])], columns=1, note=NOTE)
    return run


@pytest.fixture(scope="module")
def page(picture_run, tmp_path_factory):
    return Elements(build_report([picture_run], tmp_path_factory.mktemp("out")).html.read_text("utf-8"))


@pytest.fixture(scope="module")
def page_of_seeds(seed_runs, tmp_path_factory):
    return Elements(build_report(seed_runs, tmp_path_factory.mktemp("seeds")).html.read_text("utf-8"))


def test_the_sentence_comes_first_then_the_table_then_the_numbers(page):
    sections = [e["id"] for e in page.all("section")]
    assert sections == ["verdict", "results", "curves", "graph", "data", "protocol", "provenance"]
    order = [
        page.found.index(element)
        for element in (
            page.all("p", "sentence")[0],
            page.all("table", "verdicts")[0],
            page.all("div", "numbers")[0],
        )
    ]
    assert order == sorted(order)
    assert not [e for e in page.all("table") if page.found.index(e) < order[1]]


def test_results_come_in_the_order_of_interest(page):
    names = _texts(e for e in page.all("h3") if page.inside(e, "results"))
    assert names == ["evaluate", "detect", "segment", "probe", "finetune", "intermediate", "pretrain"]


def test_every_picture_has_its_size_opens_large_and_is_there_once(page):
    pictures = page.all("img")
    assert len(pictures) == 2
    assert len({e["src"] for e in pictures}) == 2
    assert {(e["width"], e["height"]) for e in pictures} == {("64", "32"), ("106", "94")}
    for image in pictures:
        assert "loading" not in image
        assert image["alt"]
        link, figure = image["around"][-1], image["around"][-2]
        assert (link["tag"], figure["tag"]) == ("a", "figure")
        assert link["href"] == f"#{figure['id']}"
    css = page.all("style")[0]["text"]
    assert ".zoom:target { position: fixed" in css
    # What opens must close again, without a script.
    ids = {e["id"] for e in page.found if e.get("id")}
    closing = page.all("a", "close")
    assert len(closing) == len(page.all("figure", "zoom")) > len(pictures)
    assert {e["href"][1:] for e in closing} <= ids


def test_a_picture_s_own_words_stand_below_it_as_text(page):
    captions = _texts(page.all("figcaption"))
    assert f"Predictions {NOTE}" in captions
    assert not page.all("b")


def test_nothing_is_said_twice(page):
    said = _texts(
        [*page.all("p"), *page.all("figcaption"), *page.all("h2"), *page.all("h3"), *page.all("li")]
    )
    said = [text for text in said if text]
    assert [text for text, times in Counter(said).items() if times > 1] == []
    # Tables: no two have the same rows.
    tables = [tuple(_texts(e for e in page.all("tr") if table in e["around"])) for table in page.all("table")]
    assert len(tables) == len(set(tables))
    # Run times: only beside the graph; the total in the head.
    shown = [e for e in page.all("span", "time") if e["text"].strip()]
    assert all(page.inside(e, "graph") for e in shown)
    text = page.all("body")[0]["text"]
    assert text.count("1 min 11 s") == 1


def test_parameters_are_the_same_everywhere(page):
    assert set(re.findall(r"1\.2\d* M", page.all("main")[0]["text"])) == {"1.23 M"}


def test_the_graph_is_rows_of_text_beside_its_edges(page, picture_run):
    rows = [e for e in page.all("li") if page.inside(e, "graph")]
    assert [_texts([e])[0].split()[0] for e in rows] == [node.name for node in picture_run.nodes()]
    assert "reads pretrain" in _texts(rows)[2]
    edges = [e for e in page.all("svg") if page.inside(e, "graph")]
    assert len(edges) == 1
    assert int(edges[0]["width"]) < 130


def test_every_banner_of_several_runs_says_whose_it_is(page_of_seeds, seed_runs, full_run, tmp_path):
    mixed = Elements(build_report([seed_runs[0], full_run], tmp_path).html.read_text("utf-8"))
    for shown, names in ((page_of_seeds, ("seed 0", "seed 1", "seed 2")), (mixed, ("demo", "full"))):
        banners = _texts(shown.all("p", "notice"))
        assert banners
        assert all(banner.startswith(names) for banner in banners), banners
        assert len(banners) == len(set(banners))


def test_several_runs_show_what_differs_and_count_the_rest(seed_runs, page_of_seeds):
    table = results_side_by_side(seed_runs)
    assert table is not None
    assert table.columns == ("result", "seed 0", "seed 1", "seed 2", "mean ± sd")
    assert all(len(set(row[1:4])) > 1 for row in table.rows if "%" not in row[1])
    stages = {row[0].split()[0] for row in table.rows}
    assert not stages & {"prepare", "report"}
    assert "2 more are the same in all runs" in table.title
    row = next(row for row in table.rows if row[0] == "finetune top-1")
    values = [run.artifacts["finetune"].metrics["top1"] * 100 for run in seed_runs]
    assert row[1] == f"{values[0]:.1f} %"
    assert row[4].startswith(f"{sum(values) / 3:.1f} ± ")
    settings = next(table for table in difference_tables(seed_runs) if table.name == "settings")
    assert settings.rows == (("seed", "0", "1", "2"),)
    assert not [table for table in difference_tables(seed_runs) if table.name in ("times", "origin")]
    heads = _texts(e for e in page_of_seeds.all("h3") if page_of_seeds.inside(e, "graph"))
    assert heads == ["seed 0, seed 1, seed 2"], "one graph for runs that have the same"
    # The metrics are in the table of differences, not once more by stage.
    assert not page_of_seeds.all("div", "numbers")


def test_runs_that_are_no_repetition_have_no_mean(seed_runs, full_run):
    assert results_side_by_side(seed_runs[:1]) is None
    assert difference_tables(seed_runs[:1]) == []
    other = results_side_by_side([seed_runs[0], full_run])
    assert other is not None
    assert "mean ± sd" not in other.columns
    assert next(row for row in other.rows if row[0] == "intermediate top-1")[2] == "—"
    settings = {row[0]: row[1:] for row in difference_tables([seed_runs[0], full_run])[1].rows}
    assert settings["model.name"] == ("hivit_nano", "hivit_base")


def test_runs_with_the_same_line_share_it(demo_run):
    from vitpipe.report.compare import verdicts_of

    verdicts = verdicts_of(demo_run)
    alone = verdict_table([("a", verdicts, None)])
    both = verdict_table([("a", verdicts, None), ("b", verdicts, None)])
    assert [len(group.lines) for group in both.groups] == [1] * len(alone.groups)
    assert {line.runs for group in both.groups for line in group.lines} == {("a", "b")}
    assert both.groups[-1].title == "evaluate parameters", "costs last"
    assert not both.has_reference
    assert not both.has_difference


def test_each_fact_that_forbids_a_comparison_is_listed_once(demo_run):
    from vitpipe.report.compare import verdicts_of

    verdicts = verdicts_of(demo_run)
    listed = facts_by_rows(verdicts)
    facts = [fact for _, own in listed for fact in own]
    assert len(facts) == len(set(facts))
    assert set(facts) == {fact for verdict in verdicts for fact in verdict.reason.split("; ")}
    assert listed[0][0] == "all of them"
    assert any(metric_label(verdicts[0].metric) in names for names, _ in listed)


def test_pictures_of_several_runs_stand_side_by_side_and_explain_themselves_once(make_run, tmp_path):
    runs = [
        make_run(tmp_path / f"run{seed}", load_recipe("itpn/pixel_base", "demo", [f"seed={seed}"]))
        for seed in range(3)
    ]
    # The pictures of seeds 1 and 2 are the same.
    for run, grey in zip(runs, (7, 8, 8), strict=True):
        tile = Tile(np.full((60, 90, 3), grey, np.uint8))
        write_grid(
            run.artifacts["detect"].path / "predictions.png", [Section("", [tile])], columns=1, note=NOTE
        )
    shown = Elements(build_report(runs, tmp_path / "out").html.read_text("utf-8"))
    captions = [text for text in _texts(shown.all("figcaption")) if text.startswith("Predictions")]
    assert captions == [f"Predictions · seed 0 {NOTE}", "Predictions · seed 1, seed 2"]
    # The tables of all three runs are the same, too.
    summaries = [text for text in _texts(shown.all("summary")) if text.startswith("Per class")]
    assert summaries == ["Per class · all runs 10 rows"] * 2
    figures = [e for e in shown.all("figure", "picture") if shown.inside(e, "results")]
    assert len({id(e["around"][-2]) for e in figures}) == 1
    assert figures[0]["around"][-2]["class"] == "beside"


def test_a_picture_without_words_of_its_own_has_a_title_alone(page):
    assert "Contact sheet" in _texts(page.all("figcaption"))


def test_a_large_picture_keeps_its_words(picture_run, tmp_path):
    from vitpipe.report.pictures import pictures_of

    noise = np.asarray(Image.effect_noise((900, 700), 90).convert("RGB"))
    path = picture_run.artifacts["segment"].path / "predictions.png"
    write_grid(path, [Section("", [Tile(noise)])], columns=1, note="said by the stage")
    try:
        (found,) = pictures_of(picture_run.artifacts["segment"], "x")
    finally:
        path.unlink()
    assert found.uri.startswith("data:image/jpeg")
    assert (found.note, found.width, found.height) == ("said by the stage", 916, 716)


def test_an_animation_stays_one_and_keeps_its_words(picture_run):
    from vitpipe.data.animation import write_animation
    from vitpipe.report.pictures import pictures_of

    path = picture_run.artifacts["segment"].path / "videos.gif"
    write_animation(
        path, [np.full((8, 9, 3), n, np.uint8) for n in (0, 200)], frame_ms=100, note="two frames"
    )
    try:
        found = next(
            item for item in pictures_of(picture_run.artifacts["segment"], "x") if item.title == "Videos"
        )
    finally:
        path.unlink()
    assert found.uri.startswith("data:image/gif;base64,")
    assert (found.note, found.width, found.height) == ("two frames", 9, 8)


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_in_both_themes(theme):
    """At least 4.5 : 1, Web Content Accessibility Guidelines 2.2, criterion 1.4.3."""
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    values = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css.split(":root {")[theme + 1]))
    pairs = [(text, ground) for text in ("ink", "muted", "accent") for ground in ("paper", "card", "soft")]
    pairs += [(kind, f"{kind}-soft") for kind in ("good", "near", "high", "low", "none")]
    pairs += [("ink", "notice"), ("on-series", "series-0")]
    for text, ground in pairs:
        high, low = sorted((_luminance(values[text]), _luminance(values[ground])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_a_damaged_picture_costs_only_itself(make_run, tmp_path):
    run = make_run(tmp_path / "run", load_recipe("itpn/pixel_base", "demo"))
    for name, content in (("empty", b""), ("text", b"no picture"), ("cut", b"\x89PNG\r\n\x1a\n")):
        (run.artifacts["detect"].path / f"{name}.png").write_bytes(content)
    page = build_report([run], tmp_path / "out").html.read_text("utf-8")
    assert "box AP" in page
    assert ">Text<" not in page
