"""Typical mistakes in a plugin: one paragraph that names file, line and what to do, from any verb."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_project import PARAMS, call, make_project, must, planned, refused, write

STAGE, METHOD = "mine/stages/spectrum/config.py", "mine/methods/two_views/config.py"
FAMILY, HEAD = "mine/models/toy/config.py", "mine/dense/heads/fcn/config.py"


@pytest.fixture
def project(tmp_path) -> Path:
    return make_project(tmp_path)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# (file, text that is replaced, its replacement, what is said of the line `Where`, arguments)
PLAN = ("plan",)
TWO_VIEWS = ("plan", "--set", "finetune.method=two_views")
FCN = (
    "plan", "--recipe", "itpn/pixel_base", "--profile", "demo", "--set", "segment.head=fcn",
)  # fmt: skip


@pytest.mark.parametrize(
    ("file", "old", "new", "said", "arguments"),
    [
        (STAGE, "STAGE = Stage(", "STAGE = Stage(((", "The stage 'spectrum' cannot be imported (SyntaxError", PLAN),
        (METHOD, "class Two", "clas Two", "The method 'two_views' cannot be imported (SyntaxError", TWO_VIEWS),
        (METHOD, "= 0.9", "= none", "cannot be imported (NameError: name 'none' is not defined)", TWO_VIEWS),
        (HEAD, "class Fcn", "clas Fcn", "The head 'fcn' cannot be imported (SyntaxError", FCN),
        (FAMILY, "Count = 24", "Count == 24", "The network family 'toy' cannot be imported (", PLAN),
        (STAGE, "STAGE =", "STAGES =", "The stage 'spectrum' has no STAGE in its config.py", PLAN),
        (STAGE, "CONFIG =", "CONFIGS =", "The stage 'spectrum' has no CONFIG in its config.py", PLAN),
        (METHOD, "CONFIG =", "CONFIGS =", "The method 'two_views' has no CONFIG in its config.py", TWO_VIEWS),
        (HEAD, "TASK =", "TASKS =", "The head 'fcn' has no TASK in its config.py", FCN),
        (FAMILY, "ENTRIES =", "ENTRY =", "The network family 'toy' has no ENTRIES in its config.py", PLAN),
        (METHOD, "(MethodConfig)", "", "CONFIG of the method 'two_views' is not a subclass of NamedSection", TWO_VIEWS),
        (STAGE, "(Section)", "", "CONFIG of the stage 'spectrum' is not a subclass of Section", PLAN),
        (STAGE, "STAGE = Stage(", "STAGE = dict(", "STAGE of the stage 'spectrum' is not a Stage", PLAN),
        (FAMILY, "    ),\n)", "    )\n)", "ENTRIES of the network family 'toy' is not a tuple", PLAN),
        (METHOD, 'l["two_views"] = "two_views"', 'l["views"] = "views"', "The method 'two_views' is named 'views'", TWO_VIEWS),
        (STAGE, 'name="spectrum"', 'name="spectra"', "The stage 'spectra' lies in the folder spectrum", PLAN),
        (STAGE, "order=55", "order=40", "(order 40) is fed by 'finetune', which does not come before it (order 40)", PLAN),
        (STAGE, '("finetune", "pretrain")', '("finetuning",)', "comes from 'finetuning', which is no stage", PLAN),
        (STAGE, '("finetune", "pretrain")', '("finetune")', "Input 'weights' of the stage 'spectrum' is not a tuple", PLAN),
        (STAGE, '"model", "spectrum"', '"modell", "spectrum"', "reads the section 'modell', which no recipe has", PLAN),
        (STAGE, '"model", "spectrum"', '"model"', "section of its own, which is not among its `sections`", PLAN),
        (STAGE, 'image="train"', 'image="gpu"', "The stage 'spectrum' names 'gpu'", PLAN),
    ],
)  # fmt: skip
def test_a_mistake_in_a_config_file(project, file, old, new, said, arguments):
    edit(project / file, old, new)
    text = refused(project, *arguments)
    assert said in text
    assert f"Where: {project / file}" in text
    assert " Fix: " in text


def test_file_and_line_of_a_syntax_error(project):
    edit(project / METHOD, "class Two", "clas Two")
    line = (project / METHOD).read_text().splitlines().index("clas TwoViewsConfig(MethodConfig):") + 1
    assert f"Where: {project / METHOD}, line {line}." in refused(project, *TWO_VIEWS)
    # What does not use the method is not stopped by it.
    assert "spectrum" in planned(project)


def test_a_mistake_in_the_working_module(project):
    code = project / "mine/stages/spectrum/stage.py"
    edit(code, "_BATCH = 16", "_BATCH = (16")
    assert f"The file is not valid Python ('(' was never closed). Where: {code}, line" in refused(
        project, "plan"
    )
    code.unlink()
    said = refused(project, "plan")
    assert "The module vitpipe.stages.spectrum.stage has no source file" in said
    assert "Fix: add stage.py beside it" in said


def test_a_name_that_is_taken(project):
    write(project / "mine/methods/classify/config.py", '"""Another one."""\n')
    said = refused(project, "plan")
    assert "The plugin's file methods/classify/config.py has the name of a file that is there already" in said


def test_a_stage_named_like_another_part_of_the_recipe(project):
    (project / "mine/stages/spectrum").rename(project / "mine/stages/model")
    config = project / "mine/stages/model/config.py"
    edit(config, '"spectrum"', '"model"')
    assert "A recipe has another part named 'model'" in refused(project, "plan")


@pytest.mark.parametrize("given", ["mine", "{a: mine}", "[1]"])
def test_plugins_that_are_no_list_of_texts(project, given):
    write(project / "params.yaml", PARAMS.replace("[mine]", given))
    said = refused(project, "plan")
    assert "'plugins' must be a list of folders" in said
    assert "write for example plugins: [my_methods]" in said


def test_a_folder_that_does_not_exist(project):
    write(project / "params.yaml", PARAMS.replace("mine", "yours"))
    assert "The plugin folder does not exist. Where: plugins in params.yaml: yours" in refused(
        project, "plan"
    )


def test_a_folder_of_the_environment_that_does_not_exist(tmp_path):
    done = call(tmp_path, "recipes", VITPIPE_PLUGINS="mine")
    assert done.returncode == 2
    where = f"VITPIPE_PLUGINS: {tmp_path}/mine"
    assert f"vitpipe: The plugin folder does not exist. Where: {where}." in " ".join(done.stderr.split())


def test_a_params_file_in_another_folder_names_plugins_beside_it(tmp_path):
    make_project(tmp_path / "project")
    assert "spectrum" in must(tmp_path, "plan", "--params", "project/params.yaml")
    assert "spectrum" in must(tmp_path, "plan", "--params=project/params.yaml")
    # Without it nothing is found: no plugin is left over from elsewhere.
    assert "there is no recipe 'lab/toy'" in call(tmp_path, "plan", "--recipe", "lab/toy").stderr.lower()
