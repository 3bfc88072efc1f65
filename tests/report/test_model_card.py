"""The card of a registered model: verdict, metrics with their ledger, data, limits, licence; all text escaped."""

from __future__ import annotations

import dataclasses

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.contracts.protocol import protocol_rows
from vitpipe.report.compare import verdicts_of
from vitpipe.report.model_card import CardFacts, SetFacts, model_card

METRICS = {"loss": 0.25, "top5": 0.99, "top1": 0.955, "ema_top1": 0.96}
SETS = [SetFacts("imagenet", "ImageNet-1K", "non-commercial research", 1281167, 50000, 1000, "ab" * 32)]


@pytest.fixture
def facts():
    recipe = load_recipe("itpn/pixel_base", "demo")
    protocol = protocol_rows(["top1", "top5"], {"crop": "64 of a 73 short side", "EMA": "off"})
    return CardFacts(recipe, "finetune", METRICS, protocol, SETS, "0123abc")


def test_it_says_what_somebody_who_uses_the_model_must_know(facts):
    lines = model_card(facts).splitlines()
    assert lines[0] == "# itpn/pixel_base: finetune"
    table = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and " % " in line]
    assert table == ["top1", "top5", "ema_top1"], "the main metric first, the average last"
    # The ledger once for all numbers that were measured alike.
    assert sum("crop 64 of a 73 short side" in line for line in lines) == 1
    assert any(line.startswith("* top1, top5: ") for line in lines)
    text = "\n".join(lines)
    assert "1,281,167 training and 50,000 validation images, 1,000 classes" in text
    assert "ImageNet-1K: non-commercial research" in text
    assert "Profile `demo` shows that the whole chain works" in text
    assert "at commit `0123abc`" in text
    for text_of_recipe in facts.recipe.discrepancies:
        assert text_of_recipe.split(":")[0] in text


def test_before_the_report_it_has_no_verdict_and_then_each_reason_once(facts, make_run, tmp_path):
    assert "Not compared yet" in model_card(facts)
    run = make_run(tmp_path / "run", facts.recipe)
    judged = [verdict for verdict in verdicts_of(run) if verdict.stage == "evaluate"]
    card = model_card(dataclasses.replace(facts, verdicts=judged))
    assert "| top-1 accuracy, ImageNet-1K |" in card
    reasons = {verdict.reason for verdict in judged}
    assert card.count("* not comparable, ") == len(reasons)
    assert "claims no published row" in model_card(dataclasses.replace(facts, verdicts=[]))


def test_names_of_own_sets_are_text(facts):
    hostile = SetFacts("x", "<img src=x> [a](javascript:x) **b**", "<script>", 1, 1, 2, "")
    card = model_card(dataclasses.replace(facts, sets=[hostile]))
    assert "<img" not in card
    assert "<script" not in card
    assert "[a](" not in card
    assert "**b**" not in card
