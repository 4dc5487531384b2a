"""Every example is a recipe, and CI runs them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JUSTFILE = (ROOT / "Justfile").read_text(encoding="utf-8")
# A name, its parameters, what it depends on; the lines below it, indented.
RECIPE = re.compile(r"^([a-z][a-z-]*)([^:\n]*):([^=\n]*)\n((?:    .*\n)*)", re.MULTILINE)
RECIPES = {found[1]: (found[3].split(), found[4]) for found in RECIPE.finditer(JUSTFILE)}
EXAMPLES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "examples").iterdir()
    if path.suffix in (".toml", ".py")
)


def run_by(recipe: str) -> str:
    """Return the lines a recipe runs, those of the recipes it depends on included."""
    needs, lines = RECIPES[recipe]
    return "".join(run_by(name) for name in needs) + lines


@pytest.mark.shows("K6")
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_run_by_a_recipe_of_its_own_and_by_the_one_that_ci_runs(
    example: str,
) -> None:
    own = [name for name, (_, lines) in RECIPES.items() if example in lines and name != "examples"]
    assert len(own) == 1
    line = re.search(rf"^# .+\n{own[0]}\b", JUSTFILE, re.MULTILINE)
    assert line, f"recipe {own[0]} is not explained"
    assert example in run_by("examples")


@pytest.mark.shows("K6")
def test_ci_runs_the_examples_the_demonstration_and_the_tests() -> None:
    steps = re.findall(r"^step (\w+) (.+)$", (ROOT / ".ci/run").read_text("utf-8"), re.MULTILINE)
    assert dict(steps)["examples"] == ".tools/bin/just examples"
    assert {"test", "demo", "examples"} <= dict(steps).keys()
    assert " compare " in run_by("demo")
