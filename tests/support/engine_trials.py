"""What is run through the engines in these tests: which recipe, how small, and a stand-in for the command."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE, PROFILE = "itpn/pixel_base", "demo"

# A `vitpipe` that does no work but keeps the contract; FAIL_STAGE, LIE_STAGE and QUIET_STAGE make it break
# it, SLOW_STAGE waits for SIGTERM.
STAND_IN = """\
#!{python}
import os, sys
sys.path.insert(0, {root!r})
from vitpipe.contracts.artifact import Card, write_card, write_metrics, writing
from vitpipe.contracts.errors import VitpipeError
from vitpipe.stages.executor import ExecutorIO

verb, stage, *rest = sys.argv[1:]
if verb == "conclude":
    rest, stage = [stage, *rest], "report"
options = dict(zip(rest[::2], rest[1::2]))
known = {{"--recipe", "--profile", "--executor-input"}}
assert verb in ("run", "conclude") and known <= set(options) <= {{*known, "--state"}}, sys.argv
print("working on", stage, flush=True)
if stage == os.environ.get("FAIL_STAGE"):
    print("it broke", flush=True)
    sys.exit(3)
if stage == os.environ.get("SLOW_STAGE"):
    import signal, time
    signal.signal(signal.SIGTERM, lambda *_: (print("state saved", flush=True), sys.exit(143)))
    print("waiting", flush=True)
    time.sleep(60)
io = ExecutorIO(options["--executor-input"])
if verb == "conclude" and io.parameters()["status"]["state"] == "SUCCEEDED":
    io.finish_with_text("all is well")
    sys.exit()
try:
    io.check_code(io.recipe(options["--recipe"], options["--profile"]), stage)
except VitpipeError as error:
    sys.exit(f"vitpipe: {{error}}")
metrics = {{"num_inputs": float(len(io.inputs())), "num_overrides": float(len(io.overrides()))}}
for name, folder in io.inputs().items():
    assert (folder / "card.json").is_file(), (name, folder)
card = Card(
    stage=stage, recipe=options["--recipe"], profile=options["--profile"], recipe_digest="r", data_digest="d",
    code_digest=io.parameters()["code_digest"], image="train", identity="i", parents={{}}, seed=0,
    libraries={{}},
)
out = io.output_folder()
with writing(out) as folder:
    write_metrics(folder, metrics)
    write_card(folder, card)
    for page in ("report.html", "verdict.md", "confusion.csv"):
        (folder / page).write_text("<p>" + stage, encoding="utf-8")
if stage != os.environ.get("QUIET_STAGE"):
    io.finish(metrics)
if stage == os.environ.get("LIE_STAGE"):
    write_card(out, card.model_copy(update={{"seed": 1}}))
"""


# The smallest sizes at which every real stage still does all its work.
TINY = (
    "data.embedded.train_images=40",
    "data.embedded.val_images=60",
    "data.embedded.intermediate_images=60",
    "data.embedded.scene_train_images=8",
    "data.embedded.scene_val_images=4",
    "data.embedded.video_frames=2",
    "data.embedded.videos=1",
    "data.workers=0",
    *(
        f"{stage}.{key}"
        for stage in ("pretrain", "intermediate", "finetune")
        for key in ("epochs=1", "global_batch=20", "optim.warmup_epochs=0")
    ),
    "probe.epochs=1",
    "probe.batch=20",
    "detect.epochs=1",
    "detect.optim.drop_epochs=[]",
    "detect.global_batch=4",
    "segment.steps=2",
    "segment.global_batch=2",
    "evaluate.throughput_rounds=1",
)
