"""From TOML and settings to a configuration, or to one line that says where it is wrong."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from penumbra.actors.console.config import RunConfig, Source, apply_settings, read_toml
from penumbra.actors.console.errors import UsageError
from penumbra.actors.console.prepare import config_text, identify
from penumbra.actors.console.workloads import build, find_source, schema, shipped_recordings
from penumbra.actors.vmm.schemes import PATCH, Scheme, SchemeOptions
from penumbra.hw.costs import shipped_profiles

Said = tuple[int, str, str]


def source(text: str, file: str = "x.toml") -> Source:
    return Source(file, tomllib.loads(text))


def decoded(text: str, *settings: str) -> RunConfig:
    given = source(text)
    apply_settings(given, settings)
    return given.decode()


STORM = '[workload]\nname = "fork-storm"\n'


def test_what_a_file_leaves_out_has_its_default() -> None:
    assert decoded(STORM) == RunConfig(workload={"name": "fork-storm"})


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults() -> None:
    config = decoded(
        "seed = 3\n[machine]\nvcpus = 2\nquantum = 500\n" + STORM,
        "machine.vcpus=3",
        "costs.source=mine",
        "machine.paging=ia32",
    )
    assert (config.seed, config.machine.vcpus, config.machine.quantum) == (3, 3, 500)
    assert (config.machine.paging, config.costs.source) == ("ia32", "mine")
    assert config.machine.timer_period == 100_000


@pytest.mark.shows("H11")
def test_a_shipped_cost_profile_is_named_and_overridden_price_by_price() -> None:
    costs = decoded('[costs]\nprofile = "hw-vmm-2006"\nipi = 7\n' + STORM).costs
    shipped = shipped_profiles()["hw-vmm-2006"]
    assert costs == msgspec.structs.replace(shipped, ipi=7)
    assert decoded(STORM, "costs.profile=native-2006").costs == shipped_profiles()["native-2006"]


@pytest.mark.shows("S1")
def test_a_listed_scheme_keeps_what_the_file_does_not_override() -> None:
    text = '[scheme]\nname = "patch"\napply = "invalidate"\n[scheme.options]\ncapacity = 2\n'
    scheme = decoded(text + STORM).scheme
    assert (scheme.detect, scheme.propagate, scheme.shadow) == ("write-trace", "patch", "per-cpu")
    assert (scheme.apply, scheme.options) == ("invalidate", SchemeOptions(capacity=2))


@pytest.mark.shows("S1")
def test_a_scheme_of_another_name_is_a_composition_of_its_own() -> None:
    text = (
        '[scheme]\nname = "mine"\ndetect = "write-trace"\npropagate = "shootdown"\n'
        'apply = "invalidate"\nshadow = "per-cpu"\n'
    )
    assert decoded(text + STORM).scheme == Scheme(
        name="mine", detect="write-trace", propagate="shootdown", apply="invalidate",
        shadow="per-cpu",
    )  # fmt: skip


def test_choosing_a_scheme_takes_the_files_own_of_that_name_else_the_listed_one() -> None:
    given = source('[scheme]\nname = "patch"\noptions = { capacity = 2 }\n' + STORM)
    assert given.with_scheme("patch", "--scheme").decode().scheme.options.capacity == 2
    assert given.with_scheme("shootdown", "--scheme").decode().scheme.options.capacity == 64
    apply_settings(given, ["scheme.options.capacity=5"])
    chosen = [given.with_scheme(name, "--scheme") for name in ("patch", "shootdown")]
    assert [one.decode().scheme.options.capacity for one in chosen] == [5, 5]
    assert given.decode().scheme.name == "patch"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('seed = "x"\n' + STORM, "x.toml: $.seed: Expected `int`, got `str`"),
        ("seed = -1\n" + STORM, "x.toml: $.seed: Expected `int` >= 0"),
        (
            "[machine]\nvcpu = 1\n" + STORM,
            "x.toml: $.machine: Object contains unknown field `vcpu`",
        ),
        ("machine = 1\n" + STORM, "x.toml: $.machine: Expected `object`, got `int`"),
        ("scheme = 1\n" + STORM, "x.toml: $.scheme: Expected `object`, got `int`"),
        ("[machine]\nvcpus = 17\n" + STORM, "x.toml: $.machine.vcpus: is 17: must be 1 .. 16"),
        (
            "[machine]\ntlb_entries = 7\n" + STORM,
            "x.toml: $.machine: TLB of 7 entries in 8 ways: sets must be 2**n",
        ),
        (
            "[scheme.options]\ncapacity = 0\n" + STORM,
            "x.toml: $.scheme.options.capacity: is 0: must be 1 .. 65536",
        ),
        (
            '[scheme.options]\norder = "no"\n' + STORM,
            (
                "x.toml: $.scheme.options.order: no patch order switch 'no': "
                "see `penumbra list faults`"
            ),
        ),
        (
            '[costs]\nprofile = "cheap"\n' + STORM,
            (
                "x.toml: $.costs.profile: no cost profile is named 'cheap' "
                "(known: bt-vmm-2006, hw-vmm-2006, native-2006)"
            ),
        ),
        (
            "[costs]\nprofile = [3]\n" + STORM,
            (
                "x.toml: $.costs.profile: no cost profile is named [3] "
                "(known: bt-vmm-2006, hw-vmm-2006, native-2006)"
            ),
        ),
        ("[costs]\nexit = -1\n" + STORM, "x.toml: $.costs.exit: Expected `int` >= 0"),
        ("[costs]\nexit = 1.5\n" + STORM, "x.toml: $.costs.exit: Expected `int`, got `float`"),
        ("seed = 1\n", "x.toml: $: Object missing required field `workload`"),
        (
            "[workload]\n",
            (
                "x.toml: $.workload: needs a name "
                "(buffer-pool, compile-mix, fork-storm, fork-wait, mmap-churn, mmap-server, "
                "munmap-storm, page-fault, page-splitting, process-switcher, pte-change, "
                "shootdown-stress, swap-thrash, system-calls, pipeline, workers) or a trace"
            ),
        ),
        (
            '[workload]\nname = "fork-strm"\n',
            "x.toml: $.workload.name: no workload is named 'fork-strm' (did you mean fork-storm?)",
        ),
        (
            STORM + "page = 3\n",
            (
                "x.toml: $.workload.page: no parameter of fork-storm is named 'page' "
                "(did you mean pages?)"
            ),
        ),
        (STORM + 'pages = "3"\n', "x.toml: $.workload.pages: Expected `int`, got `str`"),
        (STORM + "pages = true\n", "x.toml: $.workload.pages: Expected `int`, got `bool`"),
        (
            '[workload]\nname = "pipeline"\npages = 1\n',
            "x.toml: $.workload.pages: a recording has no parameters",
        ),
        (
            '[workload]\ntrace = "t"\npages = 1\n',
            "x.toml: $.workload.pages: a trace has no parameters",
        ),
        ("[workload]\ntrace = 3\n", "x.toml: $.workload.trace: expected a path"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_place(text: str, expected: str) -> None:
    given = source(text)
    with pytest.raises(UsageError) as raised:
        build(given, given.decode())
    assert str(raised.value) == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("machine.vcpus=x", "--set machine.vcpus=x: Expected `int`, got `str`"),
        ("machine.vcpus", "--set machine.vcpus: expected TABLE.KEY=VALUE"),
        (".vcpus=3", "--set .vcpus=3: expected TABLE.KEY=VALUE"),
        ("seed.x=3", "--set seed.x=3: seed is no table"),
        ("workload.pags=3", ("--set workload.pags=3: no parameter of fork-storm is named 'pags' "
         "(did you mean pages?)")),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_setting_is_named_with_the_setting(setting: str, expected: str) -> None:
    given = source("seed = 1\n" + STORM)

    def use() -> None:
        apply_settings(given, [setting])
        build(given, given.decode())

    with pytest.raises(UsageError) as raised:
        use()
    assert str(raised.value) == f"command line: {expected}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[machine\n", "line 1, column 9: Expected ']' at the end of a table declaration"),
        (b"a = 1\nb = \xff\n", "byte 10: not UTF-8"),
    ],
)
def test_a_file_that_is_no_toml_is_named_with_line_and_column(
    content: bytes, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_toml(path)
    assert str(raised.value) == f"{path}: {expected}"


def test_the_written_configuration_describes_the_same_run_again(tmp_path: Path) -> None:
    given = source("seed = 4\n[machine]\nvcpus = 2\n" + STORM + "rounds = 3\n")
    chosen = build(given, given.decode())
    text = config_text(given.decode(), chosen, tmp_path)
    again = source(text)
    assert identify(again.decode(), build(again, again.decode())) == identify(
        given.decode(), chosen
    )
    assert again.tables["workload"] | {"content": ""} == {
        "name": "fork-storm", "pages": 24, "children": 3, "depth": 2, "rounds": 3, "content": "",
    }  # fmt: skip


def test_the_id_changes_with_what_determines_the_run_and_with_nothing_else() -> None:
    def run_id(text: str) -> str:
        given = source(text + STORM)
        return identify(given.decode(), build(given, given.decode()))

    same = {run_id(""), run_id("seed = 0\n"), run_id('[scheme]\nname = "patch"\nabout = "x"\n')}
    others = {
        run_id("seed = 1\n"),
        run_id("[machine]\nvcpus = 2\n"),
        run_id("[costs]\nexit = 1\n"),
        run_id('[scheme]\nname = "native"\n'),
        run_id("[scheme.options]\ncapacity = 2\n"),
    }
    assert (len(same), len(others), same & others) == (1, 5, set())
    assert same.pop().startswith("fork-storm-")


def test_a_recording_is_found_by_its_shipped_name_and_by_path_from_the_file(
    tmp_path: Path,
) -> None:
    path = shipped_recordings()["pipeline"]
    (tmp_path / "mine.trace").write_bytes(path.read_bytes())
    file = tmp_path / "x.toml"
    file.write_text('[workload]\ntrace = "mine.trace"\n')
    by_path, by_name = find_source(str(file)), find_source("pipeline")
    mine, shipped = build(by_path, by_path.decode()), build(by_name, by_name.decode())
    assert mine.workload.content_hash == shipped.workload.content_hash
    assert (mine.workload.name, shipped.workload.name) == ("mine", "pipeline")
    text = config_text(by_path.decode(), mine, tmp_path / "runs" / "id")
    assert tomllib.loads(text)["workload"]["trace"] == "../../mine.trace"


def test_a_content_that_has_changed_since_is_refused() -> None:
    given = source(STORM + 'content = "00"\n')
    with pytest.raises(
        UsageError, match=r"x.toml: \$.workload.content: is 00, but the content now"
    ):
        build(given, given.decode())


def test_the_preset_is_the_default_scheme() -> None:
    assert decoded(STORM).scheme == PATCH


def test_the_schema_names_every_table(penumbra: Callable[..., Said]) -> None:
    code, out, err = penumbra("schema")
    assert (code, err, json.loads(out)) == (0, "", json.loads(json.dumps(schema())))
    properties = json.loads(out)["$defs"]["RunConfig"]["properties"]
    assert sorted(properties) == ["costs", "machine", "scheme", "schemes", "seed", "workload"]
    kinds = [kind["properties"] for kind in properties["workload"]["oneOf"]]
    [storm] = [kind for kind in kinds if kind.get("name") == {"const": "fork-storm"}]
    assert storm["pages"] == {"type": "integer", "default": 24}
