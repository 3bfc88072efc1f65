"""A recipe whose stages or methods need a network that its family does not build is refused without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vitpipe.config.model import families_that_build, family_names
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import RecipeError
from vitpipe.models.families import family

REVCOL = "revcol/supervised/tiny"
PRETRAIN = ["stages=[prepare, pretrain]", "pretrain={epochs: 1, global_batch: 8, optim: {base_lr: 0.1}}"]
DETECT = ["stages=[prepare, finetune, detect]", "detect={epochs: 1, global_batch: 8, optim: {base_lr: 0.1}}"]
SEGMENT = [
    "stages=[prepare, finetune, segment]",
    "segment={steps: 1, global_batch: 8, optim: {base_lr: 0.1}}",
]


@pytest.mark.parametrize(
    ("recipe", "sets", "reason"),
    [
        (REVCOL, PRETRAIN, "method 'masked_pixels' of stage 'pretrain' needs a network for masked"),
        (
            "revcolv2/base",
            ["finetune.method={name: intermediate_supervision}"],
            "method 'intermediate_supervision' of stage 'finetune' needs heads at intermediate depths",
        ),
        (REVCOL, DETECT, "stage 'detect' needs feature maps"),
        (REVCOL, SEGMENT, "stage 'segment' needs feature maps"),
    ],
)
def test_it_is_refused(recipe: str, sets: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason) as caught:
        load_recipe(recipe, "demo", sets)
    assert "take a network of: " in str(caught.value)


def test_what_can_be_built_is_taken() -> None:
    stages = "[prepare, finetune, probe, evaluate, report]"
    assert "probe" in load_recipe(REVCOL, "demo", [f"stages={stages}"]).stages


def test_plan_refuses_it_without_torch() -> None:
    argv = ["vitpipe", "plan", "--recipe", "revcolv2/base"]
    argv += ["--set", "finetune.method.name=intermediate_supervision"]
    code = (
        f"import sys; from vitpipe.cli import main; sys.argv = {argv}\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "needs heads at intermediate depths, which 'revcolv2_nano'" in " ".join(done.stderr.split())
    assert done.stdout.split() == ["2", "False"], done.stdout + done.stderr


def test_every_family_states_what_it_builds() -> None:
    assert families_that_build("pretrainer") == ["hivit", "itpn_vit", "revcolv2"]
    assert families_that_build("intermediate_heads") == ["revcol"]
    for name in family_names():
        assert family(name).name == name  # raises where the two differ
