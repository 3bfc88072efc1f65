"""Completion in bash: the process is started as its completion function starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitpipe.contracts.graph import all_stages
from vitpipe.verbs import completion

VITPIPE = str(Path(sys.executable).with_name("vitpipe"))
ROOT = Path(__file__).parents[2]


def completed(*words, cwd, **environment):
    """What bash is offered for the last of the words, as (names, stderr)."""
    asked = {"COMP_WORDS": " ".join(("vitpipe", *words)), "COMP_CWORD": str(len(words)), **environment}
    done = subprocess.run(
        [VITPIPE],
        cwd=cwd, env={**os.environ, "_VITPIPE_COMPLETE": "complete_bash", **asked}, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["ver"], ["verdict"]),
        (["recipe", "itpn/pixel"], ["itpn/pixel_base", "itpn/pixel_large"]),
        (["plan", "--recipe", "revcol/supervised/t"], ["revcol/supervised/tiny"]),
        (["compile", "--recipe", "itpn/pixel_b"], ["itpn/pixel_base"]),
        (["references", "--recipe", "itpn/pixel_b"], ["itpn/pixel_base"]),
        (["recipes", "revcol/"], ["revcol/supervised"]),
        (["plan", "--profile", ""], ["demo", "full"]),
        (["run", "p"], ["prepare", "pretrain", "probe"]),
        (["benchmark", "step", "itpn/pixel_base", "--stage", "fi"], ["finetune"]),
        (["cost", "hivit_"], ["hivit_nano", "hivit_base", "hivit_large"]),
        (["datasets", "cifar"], ["cifar10", "cifar100"]),
        (["doctor", "--data", "/x", "--dataset", "ade"], ["ade20k"]),
        (["table", "revcolv2/5"], ["revcolv2/5"]),
    ],
    ids=" ".join,
)
def test_names_are_completed(words, names, tmp_path):
    assert completed(*words, cwd=tmp_path) == (names, "")


def test_a_broken_params_file_breaks_no_completion(tmp_path):
    (tmp_path / "params.yaml").write_text("plugins: [nowhere]\n")
    assert completed("run", "fin", cwd=tmp_path) == (["finetune"], "")
    assert completed("recipe", "no-such", cwd=tmp_path) == ([], "")
    assert completed("plan", "--recipe", "'open", cwd=tmp_path)[1] == ""


def test_names_of_a_plugin_are_completed(tmp_path):
    plugin = ROOT / "tests" / "support" / "toy_plugin"
    (tmp_path / "mine.yaml").write_text(f"plugins: ['{plugin}']\n")
    stages = {path.name for path in (plugin / "stages").iterdir() if (path / "config.py").is_file()}
    new = sorted(stages - set(all_stages()))
    assert new
    found, _ = completed("run", "--params", "mine.yaml", new[0][:3], cwd=tmp_path)
    assert new[0] in found


def test_a_callback_that_fails_offers_nothing():
    def fail():
        raise OSError("no")

    assert completion._completion(fail)("x") == []


def test_completion_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from vitpipe.verbs import completion as c\n"
        "assert all([c.complete_recipe('i'), c.complete_profile('d'), c.complete_stage('p'), c.complete_model('h'),"
        " c.complete_table('itpn/1'), c.complete_dataset('c'), c.complete_recipe_file('i')])\n"
        "assert not {'torch', 'timm', 'mlflow', 'kfp'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_bash_loads_the_script_and_completes(tmp_path):
    script = subprocess.run(
        [VITPIPE],
        env={**os.environ, "_VITPIPE_COMPLETE": "source_bash"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    asked = (
        f"{script}\nCOMP_WORDS=(vitpipe cost hivit_l); COMP_CWORD=2\n"
        f'_vitpipe_completion {VITPIPE}; printf "%s\\n" "${{COMPREPLY[@]}}"\ncomplete -p vitpipe\n'
    )
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[0] == "hivit_large"
    assert "_vitpipe_completion vitpipe" in done.stdout
