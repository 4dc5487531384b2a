"""The file of litmus tests: what is read, and how what cannot be used is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from litmus_tests import PAGE_ONE, SAMPLE, barrier, document, mov, one_test, read, set_entry, write

from penumbra.guest.litmus import LitmusError, image_of, read_tests

Said = dict[str, Any]


def test_the_sample_is_read_whole() -> None:
    tests = read_tests(SAMPLE)
    assert len(tests) == len(json.loads(SAMPLE.read_text()))
    assert [test.id for test in tests][:2] == ["remap-noflush", "remap-invlpg"]
    assert tests[-1].smt_siblings == ((0, 1),)
    for test in tests:
        image_of(test).check()


def test_outcomes_are_spelt_as_results_are(tmp_path: Path) -> None:
    said = document([read(PAGE_ONE, "a")], allowed=[["0x00010000"], ["PF:0x04"], ["0XAB"]])
    assert one_test(tmp_path, said).allowed == (("0x10000",), ("PF:0x4",), ("0xab",))


def test_memory_holds_entries_zeros_in_tables_and_elsewhere_each_address(tmp_path: Path) -> None:
    large = document(
        [read("0x1005ffe", "a")],
        allowed=[["0x0"]],
        entries={"0x1010": "0x4000e7", "0x2004": "0x10067"},
    )
    frames = {
        gfn: np.frombuffer(data, np.uint32)
        for gfn, data in image_of(one_test(tmp_path, large)).frames.items()
    }
    assert list(frames) == [1, 2, 0x10, 0x400, 0x405, 0x406]
    assert frames[1][4] == 0x4000E7
    assert frames[1].sum() == 0x4000E7
    assert frames[2].sum() == 0x10067
    assert frames[0x405].tolist() == list(range(0x405000, 0x406000, 4))


def _changed(change: Callable[[Said], object]) -> str:
    said = document(
        [read(PAGE_ONE, "a"), set_entry("0x2004", "0x0"), mov("cr0", "0x80010011"), barrier("x")],
        [write(PAGE_ONE, "0x1", "b"), barrier("x")],
        allowed=[["0x10000", "ok"]],
    )
    change(said)
    return json.dumps([said])


def _program(said: Said) -> Any:
    return said["programs"][0]


@pytest.mark.parametrize(
    ("text", "place", "cause"),
    [
        ("", "JSON", "truncated"),
        ('[{"id": "x"', "JSON", "truncated"),
        ("[1,]", "JSON", "malformed"),
        ("\udcff", "JSON", "malformed"),
        ("[" * 100_000, "JSON", "recursion"),
        ("[]", "whole file", "holds no test"),
        ('{"id": "x"}', "whole file", "Expected `array`, got `object`"),
        ('["x"]', "tests[0]", "Expected `object`, got `str`"),
        (_changed(lambda s: s.pop("init")), "tests[0]", "missing required field `init`"),
        (_changed(lambda s: s.update(id=7)), "tests[0].id", "Expected `str`, got `int`"),
        (
            _changed(lambda s: _program(s)[0].update(la=4096)),
            "tests[0].programs[0][0].la",
            "Expected hex text",
        ),
        (
            _changed(lambda s: _program(s)[0].update(la="0xg")),
            "tests[0].programs[0][0].la",
            "'0xg' is no hex number",
        ),
        (
            _changed(lambda s: _program(s)[1].update(val="0x100000000")),
            "tests[0].programs[0][1].val",
            "is no number of 32 bits",
        ),
        (
            _changed(lambda s: _program(s)[0].update(op="reed")),
            "tests[0].programs[0][0].op",
            "Invalid value 'reed'",
        ),
        (_changed(lambda s: s["init"]["cpus"].pop()), "test 0 ('made')", "2 programs for 1 CPUs"),
        (_changed(lambda s: s.update(programs=[])), "test 0 ('made')", "0 programs"),
        (
            _changed(lambda s: s["init"]["cpus"][0].update(cr0="0x11")),
            "test 0 ('made')",
            "init.cpus[0]: paging is off in cr0 0x11",
        ),
        (
            _changed(lambda s: s["init"]["cpus"][0].update(cr4="0x20")),
            "test 0 ('made')",
            "init.cpus[0]: cr4 0x20 has PAE",
        ),
        (
            _changed(lambda s: s["init"]["entries"][0].update(pa="0x1002")),
            "test 0 ('made')",
            "init.entries[0]: 0x1002 is no address of a dword",
        ),
        (
            _changed(lambda s: _program(s)[0].update(cpl=4)),
            "test 0 ('made')",
            "programs[0][0]: cpl 4: must be 0 to 3",
        ),
        (
            _changed(lambda s: _program(s)[1].update(pa="0x2006")),
            "test 0 ('made')",
            "programs[0][1]: 0x2006 is no address of a dword",
        ),
        (
            _changed(lambda s: _program(s)[2].update(val="0x80000000")),
            "test 0 ('made')",
            "programs[0][2]: cr0 0x80000000 has PG without PE",
        ),
        (
            _changed(lambda s: s.update(smt_siblings=[[0, 2]])),
            "test 0 ('made')",
            "smt_siblings [[0, 2]]: must name each of 2 CPUs at most once",
        ),
        (
            _changed(lambda s: s["observed"].append("z")),
            "test 0 ('made')",
            "observed 'z': no operation sets it",
        ),
        (
            _changed(lambda s: s["allowed"].append(["0x1"])),
            "test 0 ('made')",
            "allowed: ['0x1'] is not a value per observed register",
        ),
        (
            _changed(lambda s: s.update(sticky=[["ok", "PF:"]])),
            "test 0 ('made')",
            "sticky: 'PF:' is neither hex, 'ok' nor 'PF:' and hex",
        ),
        (_changed(lambda s: s.update(allowed=[])), "test 0 ('made')", "allowed: no outcome"),
        (
            _changed(
                lambda s: (
                    s["programs"][1].insert(0, barrier("y")) or _program(s).append(barrier("y"))
                )
            ),
            "test 0 ('made')",
            "no CPU can pass the barriers 'x', 'y'",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_place_and_cause(
    text: str, place: str, cause: str, tmp_path: Path
) -> None:
    path = tmp_path / "tests.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(LitmusError) as raised:
        read_tests(path)
    assert (raised.value.file, raised.value.place) == (str(path), place)
    assert cause in raised.value.cause


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LitmusError, match=r"no\.json: open: No such file"):
        read_tests(tmp_path / "no.json")
