"""What a reader meets first: the README's links, commands and code."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

import helpers
from support.stored import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*arguments, cwd):
    """Return what Python printed in a folder, without a GPU."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    options = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_link_and_every_target_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) > 20
    assert not [link for link in links if not (ROOT / link).exists()]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    commands = set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.M))
    assert {"reproduce", "lab", "test", "site"} <= commands <= targets


@pytest.mark.parametrize("named", [{}, {"THESIS_DATA": "there", "KERAS_HOME": "elsewhere"}])
def test_make_hands_on_what_is_set_and_nothing_else(named):
    """An empty KERAS_HOME would be the present folder for Keras, which writes a file into it."""
    ours = "THESIS_DATA", "KERAS_HOME"
    env = {k: v for k, v in os.environ.items() if k not in (*ours, "MAKEFLAGS")}
    command = ["make", "--silent", "--eval", "seen:; @env", "seen"]
    command += [f"{name}={value}" for name, value in named.items()]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert {k: v for k, v in seen.items() if k in ours} == named


def test_every_text_file_is_opened_with_its_encoding():
    """Where the linter can not see that it is a path: a locale must not change what is read."""
    files = [
        path for folder in ("helpers", "tests", "docs") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    for path in files:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if getattr(getattr(call, "func", None), "attr", None) in ("read_text", "write_text"):
                named = [keyword.arg for keyword in call.keywords]
                assert "encoding" in named, f"{path}, line {call.lineno}"


@pytest.mark.parametrize("name", ["helpers", "influence_functions"])
def test_the_code_for_your_own_model_runs_as_it_stands(name, tmp_path):
    """In any folder, with the package that is installed, or with a copy of another name."""
    first, *then = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in first.splitlines() if line]) <= 16
    if name != "helpers":
        shutil.copytree(ROOT / "helpers", tmp_path / name)
    code = "".join([first, *then]).replace("from helpers", f"from {name}")
    printed = run("-c", code, cwd=tmp_path)
    assert "5 of 5 right-hand sides solved" in printed
    assert "20 removals, 5 test points: r" in printed
    assert re.search(r"most helpful for test 0: \[[ \d]+\]", printed)
    in_other_forms = re.findall(r"^\[[ \d]+\]$", printed, re.M)  # a frame, tf.data, PyDataset
    assert len(in_other_forms) == 3
    assert len(set(in_other_forms)) == 1
    assert "1 of 1 right-hand sides solved" in printed  # of a text


def test_every_exported_name_has_an_example_that_runs(tmp_path):
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    sections = re.findall(r"### `(\w+)`\n(.*?)(?=\n##|$)", text, re.S)
    assert sorted(name for name, _ in sections) == sorted(helpers.__all__)
    for name, section in sections:
        assert f"from helpers import {name}\n" in section
        assert re.search(rf"[^`]\b{name}\(", section.partition("import ")[2]), name
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.S))
    printed = run("-W", "error::UserWarning", "-c", code, cwd=tmp_path)
    assert "300 examples" in printed
    assert "NOT CONVERGED" not in printed
