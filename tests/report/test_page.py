"""The page is one whole file, says what it must, and holds for one run and for many."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser

import pytest

from vitpipe.contracts.artifact import open_artifact
from vitpipe.contracts.errors import ArtifactError
from vitpipe.report.results import RunResults, open_results
from vitpipe.report.write_report import build_report, verdict_lines

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checker(HTMLParser):
    """Tags are closed in order; ids, links and sources are collected."""

    def __init__(self):
        super().__init__()
        self.open_tags, self.ids, self.links, self.sources = [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.sources += [values[key] for key in ("src", "xlink:href") if key in values]
        assert tag not in ("script", "link")
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag


def _check(path):
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open_tags
    assert len(checker.ids) == len(set(checker.ids))
    assert all(source.startswith(("data:", "#")) for source in checker.sources)
    inside = {link[1:] for link in checker.links if link.startswith("#")}
    assert inside <= set(checker.ids)
    assert not re.findall(r"url\((?!#)|@import", text)
    return text, checker


def test_sentences_about_a_result_stand_above_its_numbers(tmp_path, make_run, demo_run):
    said = [{"warning": "Collapse: <b>all</b> the same."}]
    run = make_run(tmp_path / "run", demo_run.recipe, {("pretrain", "warnings"): said})
    page = build_report([run], tmp_path / "page")
    text, _ = _check(page.html)
    assert '<p class="notice">Collapse: &lt;b&gt;all&lt;/b&gt; the same.</p>' in text
    assert "Collapse: " in page.html.with_name("report.md").read_text()


@pytest.fixture(scope="module")
def demo_page(demo_run, tmp_path_factory):
    return build_report([demo_run], tmp_path_factory.mktemp("page"))


def test_the_page_is_whole_and_says_everything(demo_page, demo_run):
    text, checker = _check(demo_page.html)
    for anchor in ("verdict", "graph", "data", "curves", "results", "protocol", "provenance", "run0-detect"):
        assert anchor in checker.ids
    assert "not comparable" in text
    assert "5 of 5 published rows not comparable: other data, other network" in text
    assert "imagenet (embedded) has 2,000 training" in text
    assert "85.5 %" in text
    assert "AP₅₀" in text
    assert text.count("data:image/png") == 1
    assert "a &lt;fast&gt; one" in text
    assert demo_run.recipe.discrepancies[0].split(":")[0] in text
    assert all(artifact.card.recipe_digest[:12] in text for artifact in demo_run.artifacts.values())


def test_markdown_says_the_same_and_its_pictures_exist(demo_page):
    text = demo_page.markdown.read_text(encoding="utf-8")
    for part in ("## Verdict", "not comparable", "85.5 %", "AP₅₀", "## Protocol", "## Provenance"):
        assert part in text
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(named) == len(demo_page.figures) >= 6
    assert all((demo_page.markdown.parent / name).is_file() for name in named)
    assert "\n\n\n\n" not in text


def test_metrics_and_table(demo_page):
    assert demo_page.metrics["num_not_comparable"] == demo_page.metrics["num_expected"] == 5
    with (demo_page.html.parent / "tables" / "verdict.csv").open() as handle:
        assert [row["verdict"] for row in csv.DictReader(handle)] == ["not comparable"] * 5


def test_a_full_run_is_judged(full_run, tmp_path):
    text, _ = _check(build_report([full_run], tmp_path).html)
    assert 'class="chip below"' in text
    assert 'class="gauge"' in text
    assert "Not comparable:" not in text


def test_many_runs_side_by_side(seed_runs, full_run, tmp_path):
    text, checker = _check(build_report([*seed_runs, full_run], tmp_path).html)
    assert "differences" in checker.ids
    assert text.count('rowspan="4"') == 4
    assert text.count('rowspan="2"') == 1, "the parameters are the same at all seeds"
    assert {"run0-detect", "run3-detect"} <= set(checker.ids)


def test_a_run_of_one_stage(demo_run, tmp_path):
    only = RunResults(demo_run.recipe, {"probe": demo_run.artifacts["probe"]})
    text, checker = _check(build_report([only], tmp_path).html)
    assert "did not run" in text
    assert "data" not in checker.ids


def test_no_run_is_an_input_error(demo_run, tmp_path):
    with pytest.raises(ArtifactError, match="no run"):
        build_report([], tmp_path)
    with pytest.raises(ArtifactError, match="no finished stage"):
        open_results(demo_run.recipe, tmp_path)


def test_results_are_opened_from_a_folder(demo_run):
    folder = demo_run.artifacts["probe"].path.parent
    assert set(open_results(demo_run.recipe, folder).artifacts) == set(demo_run.artifacts)
    assert open_artifact(folder / "probe", "probe").metrics == demo_run.artifacts["probe"].metrics


def test_lines_for_the_terminal(demo_run, full_run):
    lines = verdict_lines([demo_run], width=100)
    assert any("top-1 accuracy, ImageNet-1K" in line and "85.5 %" in line for line in lines)
    assert "5 of 5 published rows not comparable: other data" in lines[0]
    assert any(line.startswith("Not comparable (evaluate top1): imagenet (embedded) has") for line in lines)
    assert all(len(line) <= 100 for line in lines)
    assert "\x1b[" not in "".join(lines)
    assert "\x1b[" in "".join(verdict_lines([full_run], colour=True))
