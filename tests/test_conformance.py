"""The rows of docs/conformance.md; and every test collected with this one names rows of it.

That no row is without a test is seen when all tests are collected: `just conformance --check`.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

IDS = {
    "K": 8, "H": 12, "G": 9, "V": 11, "P": 13, "I": 12, "W": 6, "S": 3, "C": 5,
    "VTLBc ": 30, "ET": 15, "EP": 20, "EG": 7, "race ": 6,
}  # fmt: skip
BLOCKS = {
    "A40": [
        *range(800, 818, 2), 831, 832, 834, 836, 837, 838, 840, 842, 844, 848, *range(860, 882, 2),
    ],
    "VTLB": [
        404, 406, 408, *range(504, 520, 2), 522, 524, *range(704, 724, 2), *range(730, 772, 2),
        *range(802, 810, 2), 809, 810, 812, *range(820, 854, 2), *range(884, 902, 2),
        *range(952, 964, 2), 1003, 1004, 1006, 1008, *range(1012, 1028, 2), *range(1028, 1036, 2),
        *range(1038, 1056, 2), 1058,
    ],
}  # fmt: skip


def load() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "conformance.py"
    spec = spec_from_file_location("conformance", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conformance = load()
ROWS: dict[str, dict[str, str]] = conformance.read_rows()
NAMES = {row for entries in ROWS.values() for row in entries}


@pytest.mark.parametrize("group", IDS)
def test_every_requirement_claim_erratum_and_race_has_a_row(group: str) -> None:
    numbered = {row for row in NAMES if row.startswith(group) and row[len(group) :].isdigit()}
    assert numbered == {f"{group}{n}" for n in range(1, IDS[group] + 1)}


def test_every_claim_of_the_patch_channels_has_a_row() -> None:
    assert {row for row in NAMES if row.startswith("A40c")} == {f"A40c {n}" for n in range(48, 75)}


@pytest.mark.parametrize("text", BLOCKS)
def test_every_block_of_the_flow_charts_has_a_row(text: str) -> None:
    assert {f"{text} {block}" for block in BLOCKS[text]} <= NAMES


def test_every_row_says_in_one_cell_what_it_asks_for() -> None:
    for entries in ROWS.values():
        for row, what in entries.items():
            assert 3 <= len(what) <= 110, row
            assert "|" not in what, row
            assert what[0] != " ", row


def test_markers_of_the_tests_collected_name_rows(request: pytest.FixtureRequest) -> None:
    named = {
        (str(row), item.nodeid.partition("[")[0])
        for item in request.session.items
        for marker in item.iter_markers("shows")
        for marked in marker.args
        for row in conformance.canonical(marked)
    }
    assert {(row, test) for row, test in named if row not in NAMES} == set()


@pytest.mark.parametrize(
    ("marker", "rows"),
    [
        ("P9", ["P9"]),
        ("A40c 49", ["A40c 49"]),
        ("Fig 11 837 838", ["A40 837", "A40 838"]),
        ("Fig 8 816", ["A40 816"]),
        ("Fig 8 884", ["VTLB 884"]),
        ("Fig 7D 802", ["VTLB 802"]),
        ("Fig 9 394F", ["A40 394F"]),
        ("Fig 9 952", ["VTLB 952"]),
        ("Fig 10 398P", ["A40 398P"]),
        ("Fig 10A 1003", ["VTLB 1003"]),
        ("VTLB Fig 6", ["VTLB Fig 6"]),
        ("Fig 13B", ["A40 Fig 13B"]),
    ],
)
def test_a_block_may_be_named_with_its_figure_and_its_number_tells_the_text(
    marker: str, rows: list[str]
) -> None:
    assert conformance.canonical(marker) == rows
    assert set(rows) <= NAMES


def test_the_table_gives_names_of_few_tests_and_counts_of_many() -> None:
    few = {"tests/hw/test_a.py::test_a_b", "tests/hw/test_a.py::TestWalks::runTest"}
    many = {f"tests/hw/test_{file}.py::test_{n}" for file in "ab" for n in range(5)}
    text = conformance.render(
        {"Section": {"X1": "one", "X2": "two", "X3": "three"}}, {"X1": few, "X2": many}
    )
    assert text.endswith(
        "## Section\n\n| row | what | shown by |\n| --- | --- | --- |\n"
        "| X1 | one | [hw/test_a.py](../tests/hw/test_a.py): TestWalks; a b |\n"
        "| X2 | two | 10 tests: [hw/test_a.py](../tests/hw/test_a.py) 5, "
        "[hw/test_b.py](../tests/hw/test_b.py) 5 |\n"
        "| X3 | three | none |\n"
    )


def test_check_names_what_is_wrong_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = tmp_path / "conformance.md"
    monkeypatch.setattr(conformance, "ROOT", tmp_path)
    monkeypatch.setattr(conformance, "TABLE", table)
    monkeypatch.setattr(conformance, "read_rows", lambda: {"S": {"X1": "one", "X2": "two"}})
    shown = {"X1": {"tests/test_a.py::test_a"}, "Y": {"tests/test_a.py::test_b"}}
    monkeypatch.setattr(conformance, "collect", lambda: shown)
    monkeypatch.setattr(sys, "argv", ["conformance.py", "--check"])
    assert conformance.main() == 1
    assert capsys.readouterr().err.splitlines() == [
        "tests/test_a.py::test_b: marker 'Y' names no row",
        "rows without a test: X2",
        "conformance.md is stale: run `just conformance`",
    ]
    assert not table.exists()
    shown.update(X2=shown.pop("Y"))
    monkeypatch.setattr(sys, "argv", ["conformance.py"])
    assert conformance.main() == 0
    monkeypatch.setattr(sys, "argv", ["conformance.py", "--check"])
    assert (conformance.main(), capsys.readouterr().err) == (0, "")
