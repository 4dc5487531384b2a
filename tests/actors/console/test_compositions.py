"""Schemes of a user's own, in files and configurations: listed, compared, or refused by place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from penumbra.actors.console.compositions import read_schemes
from penumbra.actors.vmm.schemes import PRESETS

Penumbra = Callable[..., tuple[int, str, str]]

TINY = ("--set", "workload.pages=3", "--set", "workload.children=1", "--set", "workload.depth=1")
FOUR = '[[schemes]]\nname = "four"\nbase = "patch"\noptions = { capacity = 4 }\n'
IMMEDIATE = (
    '[[schemes]]\nname = "immediate"\ndetect = "write-trace"\npropagate = "shootdown"\n'
    'apply = "invalidate"\nshadow = "per-cpu"\n'
)
EXAMPLE = Path(__file__).parents[3] / "examples" / "own_schemes.toml"


def written(text: str, name: str = "own.toml") -> str:
    Path(name).write_text(text)
    return name


@pytest.mark.shows("S1")
def test_schemes_of_a_file_run_beside_the_listed_ones(penumbra: Penumbra) -> None:
    file = written(FOUR + IMMEDIATE)
    words = ("compare", "fork-storm", *TINY, "--jobs", "1", "--scheme-file", file)
    code, out, _ = penumbra(*words, "--schemes", "shootdown,immediate,patch,four", "--json")
    ran = {one["scheme"]: one["summary"] for one in json.loads(out)["schemes"]}
    assert (code, list(ran)) == (0, ["shootdown", "immediate", "patch", "four"])
    # The same composition under another name does the same; a smaller channel does not.
    assert ran["immediate"]["counters"] == ran["shootdown"]["counters"]
    assert ran["four"]["counters"]["overflow"] > ran["patch"]["counters"].get("overflow", 0)


@pytest.mark.shows("S1", "S3")
def test_without_a_choice_all_listed_and_all_own_schemes_are_compared(penumbra: Penumbra) -> None:
    config = (
        f'seed = 3\n{FOUR}[workload]\nname = "fork-storm"\npages = 2\nchildren = 1\ndepth = 1\n'
    )
    words = ("compare", written(config, "c.toml"), "--scheme-file", written(IMMEDIATE), "--json")
    code, out, err = penumbra(*words)
    said = json.loads(out)
    assert (code, err) == (0, "")
    names = [*PRESETS, "four", "immediate"]
    assert [one["scheme"] for one in said["schemes"]] == names
    assert {one["verdict"] for one in said["schemes"]} == {"coherent"}
    assert said["memory"]["agree"]
    assert len({one["summary"]["progress"] for one in said["schemes"]}) == 1


def test_a_run_takes_an_own_scheme_by_name_and_its_folder_replays(penumbra: Penumbra) -> None:
    words = ("run", "fork-storm", *TINY, "--scheme-file", written(FOUR), "--scheme", "four")
    code, out, _ = penumbra(*words, "--json")
    said = json.loads(out)
    assert (code, said["scheme"]) == (0, "four")
    Path("own.toml").unlink()
    assert penumbra("replay", said["id"], "--quiet")[:2] == (0, f"{said['id']}: the same bytes\n")


def test_own_schemes_can_be_listed(penumbra: Penumbra) -> None:
    code, out, err = penumbra("list", "schemes", "--scheme-file", written(FOUR))
    assert (code, err) == (0, "")
    line = out.splitlines()[-1].split()
    assert line[:5] == ["four", "write-trace", "patch", "update", "per-cpu"]
    assert "capacity=4" in line[5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[schemes]]\nname = "patch"\n', "own.toml: $.schemes[0].name: 'patch' is the name of a"),
        (FOUR + FOUR, "own.toml: $.schemes[1].name: 'four' is the name of another"),
        ('[[schemes]]\nbase = "patch"\n', "own.toml: $.schemes[0].name: a scheme needs a name"),
        ('[[schemes]]\nname = "a,b"\n', "own.toml: $.schemes[0].name: 'a,b' cannot be named"),
        ('[[schemes]]\nname = "a"\nbase = "b"\n', "own.toml: $.schemes[0].base: no scheme is nam"),
        ('[[schemes]]\nname = "a"\nbase = 3\n', "own.toml: $.schemes[0].base: no scheme is named"),
        ('[[schemes]]\nname = "a"\nbase = ["b"]\n', "own.toml: $.schemes[0].base: no scheme is"),
        ('schemes = 3\n', "own.toml: $.schemes: expected an array of tables"),
        ('schemes = [3]\n', "own.toml: $.schemes[0]: expected a table"),
        ('scheme = 3\n', "own.toml: $.scheme: expected a table"),
        ("", "own.toml: whole file: holds no scheme"),
        ('[machine]\nvcpus = 2\n', "own.toml: $.machine: a scheme file holds [scheme] or"),
        (
            '[[schemes]]\nname = "a"\ndetect = "write-trace"\n',
            "own.toml: $.schemes[0]: scheme 'a': ",
        ),
        ('[[schemes]]\nname = "a"\nbase = "patch"\napply = "x"\n', "own.toml: $.schemes[0].appl"),
        (FOUR.replace("four", "a").replace("4", "0"), "own.toml: $.schemes[0].options.capacity: "),
        ('[[schemes]]\nname = "a"\nbase = "patch"\noptions = 3\n', "own.toml: $.schemes[0].opt"),
        ('[[schemes]]\nname = "a"\nbase = "patch"\nx = 3\n', "own.toml: $.schemes[0]: "),
    ],
)  # fmt: skip
def test_a_scheme_that_cannot_be_is_one_line_that_says_where(
    text: str, said: str, penumbra: Penumbra
) -> None:
    for command in (("compare", "fork-storm", *TINY), ("list", "schemes")):
        code, out, err = penumbra(*command, "--scheme-file", written(text))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"penumbra: {said}")
    assert not Path("runs").exists()


def test_an_own_scheme_of_the_configurations_name_is_a_clash(penumbra: Penumbra) -> None:
    config = '[scheme]\nname = "four"\n[workload]\nname = "fork-storm"\n'
    words = ("compare", written(config, "c.toml"), "--scheme-file", written(FOUR))
    code, _, err = penumbra(*words)
    assert (code, "own.toml: $.schemes[0].name: 'four' is the name of another" in err) == (2, True)


def test_a_file_that_is_not_there_is_named(penumbra: Penumbra) -> None:
    code, out, err = penumbra("list", "schemes", "--scheme-file", "none.toml")
    assert (code, out) == (2, "")
    assert err == "penumbra: none.toml: read: No such file or directory\n"


def test_the_command_lines_options_hold_for_own_schemes_too(penumbra: Penumbra) -> None:
    words = ("compare", "fork-storm", *TINY, "--scheme-file", written(FOUR), "--schemes", "four")
    code, out, _ = penumbra(*words, "--set", "scheme.options.capacity=2", "--json")
    [one] = json.loads(out)["schemes"]
    assert code == 0
    peaks = [channel["peak"] for row in one["summary"]["matrix"] for channel in row]
    assert max(peaks) == 2


def test_the_example_holds_schemes_that_run(penumbra: Penumbra) -> None:
    names = [listed.table["name"] for listed in read_schemes(EXAMPLE)]
    words = ("compare", "fork-storm", *TINY, "--scheme-file", str(EXAMPLE), "--jobs", "1")
    code, out, _ = penumbra(*words, "--schemes", ",".join(names), "--quiet")
    assert (code, out) == (0, "".join(f"{name}: coherent\n" for name in names))
