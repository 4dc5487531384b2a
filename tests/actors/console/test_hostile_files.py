"""Whatever a file holds, the command reads it right or refuses it by name in one line: never more.

Each kind of file is cut, flipped, filled with noise, and changed within its own format, so that the
change is seen by the reader's own rules and not by a checksum or a parser before them.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Arrays, changed_arrays, mutated, spoilt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litmus_tests import PAGE_ONE, PTE_ONE, barrier, document, invlpg, read, set_entry

import penumbra.guest
from penumbra.actors.console.config import read_toml
from penumbra.actors.console.errors import UsageError
from penumbra.guest.litmus import LitmusError, read_tests

from .conftest import Said

Penumbra = Callable[..., Said]
DATA = Path(__file__).parents[2] / "data"
RECORDINGS = Path(next(iter(penumbra.guest.__path__))) / "recordings"
ANYTHING = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def used_or_refused(said: Said, path: Path | str) -> None:
    """Assert that a command has done its work, or has said in one line why it cannot."""
    assert said.code in (0, 1, 2), said
    if said.code == 2:
        assert said.out == ""
        assert said.err.startswith(f"penumbra: {path}: "), said.err
        assert said.err.count("\n") == 1
        assert said.err.endswith("\n")
        assert "\x1b" not in said.err
    else:
        assert "Traceback" not in said.err


# ---- arrays: recorded accesses, page-table snapshots ---------------------------------------------


def arrays_of(name: str, rows: int) -> Arrays:
    """Return the first rows of a sample's arrays."""
    with np.load(DATA / name) as file:
        return {key: file[key][:rows] for key in file.files}


CPU = {"mode": "2level", "cr0": 1 << 31, "cr3": 0x7000, "cr4": 16, "efer": 0, "cpl": 0}
META = [{"ram_bytes": 1 << 24, "cpus": [CPU]}]


def snapshot() -> Arrays:
    """Return one snapshot: a directory, a table, a mapping and a large one."""
    words = np.zeros((2, 1024), "<u4")
    words[0, :2] = 0x9003, 0x40_0083
    words[1, 5] = 0x3003
    return {
        "meta": np.frombuffer(json.dumps(META).encode(), np.uint8),
        "s0_frames": np.array([7, 9], np.uint32),
        "s0_pages": words.view(np.uint8).reshape(2, 4096),
        "s0_cpu0_linear": np.array([0x5000, 0x40_0000], np.uint64),
        "s0_cpu0_phys": np.array([0x3000, 0x40_0000], np.uint64),
        "s0_cpu0_flags": np.array([1, 0x41], np.uint16),
    }


FILES = {
    "mmu": ("mmu_cases_sample.npz", arrays_of("mmu_cases_sample.npz", 12)),
    "walk": ("walk_sample_ia32.npz", snapshot()),
}


def test_the_files_that_are_changed_below_are_good_as_they_are(penumbra: Penumbra) -> None:
    for kind, (_, arrays) in FILES.items():
        np.savez("good.npz", **arrays)  # type: ignore[arg-type]
        assert penumbra("check", kind, "good.npz").code == 0
    Path("good.json").write_text(json.dumps([LITMUS]))
    assert penumbra("litmus", "good.json", "--schedules", "2").code == 0
    Path("good.toml").write_text(as_file(CONFIG))
    assert penumbra("run", "good.toml").code == 0
    Path("good.log").write_bytes(LOG)
    assert penumbra("trace", "import", "--lackey", "good.log", "-o", "out.trace").code == 0


@pytest.mark.parametrize("kind", FILES)
def test_damaged_arrays_are_checked_or_refused(penumbra: Penumbra, kind: str) -> None:
    whole = (DATA / FILES[kind][0]).read_bytes()
    path = Path("some.npz")

    @settings(ANYTHING, max_examples=25)
    @given(spoilt(whole))
    def run(octets: bytes) -> None:
        path.write_bytes(octets)
        used_or_refused(penumbra("check", kind, str(path)), path)

    run()


@pytest.mark.parametrize("kind", FILES)
def test_arrays_of_other_shapes_types_and_numbers_are_checked_or_refused(
    penumbra: Penumbra, kind: str
) -> None:
    path = Path("some.npz")

    @ANYTHING
    @given(changed_arrays(FILES[kind][1]))
    def run(arrays: Arrays) -> None:
        np.savez(path, **arrays)  # type: ignore[arg-type]
        used_or_refused(penumbra("check", kind, str(path)), path)

    run()


def test_arrays_that_unpack_to_more_than_memory_are_refused_unread(
    penumbra: Penumbra, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = snapshot() | {"s0_pages": np.zeros((500, 4096), np.uint8)}
    np.savez_compressed("bomb.npz", **arrays)  # type: ignore[arg-type]
    assert Path("bomb.npz").stat().st_size < 10_000
    monkeypatch.setattr("penumbra.actors.lab.files.MAX_BYTES", 1_000_000)
    said = penumbra("check", "walk", "bomb.npz")
    assert said.code == 2
    assert said.err.startswith("penumbra: bomb.npz: arrays: unpack to 204")
    assert said.err.endswith(" bytes, more than 1000000\n")


def test_an_array_that_claims_to_be_longer_than_its_bytes_is_refused(penumbra: Penumbra) -> None:
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }"
    head += b" " * (117 - len(head)) + b"\n"
    with zipfile.ZipFile("long.npz", "w") as file:
        file.writestr("meta.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
    said = penumbra("check", "walk", "long.npz")
    assert said.code == 2
    used_or_refused(said, "long.npz")


def test_any_description_of_a_snapshot_is_checked_or_refused(penumbra: Penumbra) -> None:
    path = Path("some.npz")

    @ANYTHING
    @given(mutated(META))
    def run(meta: Any) -> None:
        text = json.dumps(meta).encode()
        np.savez(path, **snapshot() | {"meta": np.frombuffer(text, np.uint8)})  # type: ignore[arg-type]
        used_or_refused(penumbra("check", "walk", str(path)), path)

    run()


# ---- litmus tests --------------------------------------------------------------------------------

LITMUS = document(
    [read(PAGE_ONE, "a"), barrier("b"), invlpg(PAGE_ONE), read(PAGE_ONE, "c")],
    [set_entry(PTE_ONE, "0x12067"), barrier("b")],
    allowed=[["0x10000", "0x12000"], ["0x12000", "0x12000"]],
    smt_siblings=[[0, 1]],
)


def test_any_litmus_document_runs_or_is_refused(penumbra: Penumbra) -> None:
    path = Path("some.json")

    @ANYTHING
    @given(mutated([LITMUS]))
    def run(tests: Any) -> None:
        path.write_text(json.dumps(tests))
        words = ["litmus", str(path), "--schedules", "2", "--scheme", "patch"]
        used_or_refused(penumbra(*words), path)

    run()


@given(spoilt((DATA / "litmus_sample.json").read_bytes()))
@settings(deadline=None)
def test_damaged_litmus_files_hold_tests_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, octets: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "some.json"
    path.write_bytes(octets)
    try:
        tests = read_tests(path)
    except LitmusError as error:
        cause = str(error)
    else:
        assert tests
        return
    assert str(path) in cause
    assert "\n" not in cause


# ---- configurations: machine, scheme, workload, costs --------------------------------------------

CONFIG: dict[str, Any] = {
    "seed": 3,
    "machine": {"vcpus": 2, "paging": "ia32", "tlb": "software", "tlb_entries": 64, "tlb_ways": 4},
    "scheme": {"name": "patch", "options": {"capacity": 8, "order": "correct"}},
    "workload": {"name": "fork-storm", "depth": 1, "pages": 2, "rounds": 1},
    "costs": {"source": "a test", "exit": 700, "tlb_refill": 30},
}


def toml(value: Any) -> str:
    """Write a value as TOML: tables inline, texts escaped."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if "e" not in repr(value) or "." in repr(value) else "1.5"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else str(value)


def as_file(config: Any) -> str:
    pairs = config.items() if isinstance(config, dict) else [("value", config)]
    return "".join(f"{toml(str(key))} = {toml(value)}\n" for key, value in pairs)


def decoded_or_refused(path: Path) -> None:
    try:
        config = read_toml(path).decode()
    except UsageError as error:
        cause = str(error)
    else:
        assert config.machine.problem() is None
        assert config.scheme.problem() is None
        assert config.costs.cost({"exit": 1}) >= 0
        return
    assert str(path) in cause
    assert "\n" not in cause


@given(mutated(CONFIG))
@settings(deadline=None, max_examples=400)
def test_any_configuration_is_taken_whole_or_refused_by_its_place(
    tmp_path_factory: pytest.TempPathFactory, config: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "some.toml"
    path.write_text(as_file(config), encoding="utf-8", errors="replace")
    decoded_or_refused(path)


@given(spoilt(as_file(CONFIG).encode()))
@settings(deadline=None, max_examples=200)
def test_a_damaged_configuration_is_taken_whole_or_refused_by_its_place(
    tmp_path_factory: pytest.TempPathFactory, octets: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "some.toml"
    path.write_bytes(octets)
    decoded_or_refused(path)


def test_what_is_refused_on_reading_never_runs(penumbra: Penumbra) -> None:
    path = Path("some.toml")

    @settings(max_examples=25, deadline=None)
    @given(st.sampled_from(["machine", "scheme", "costs"]), mutated(CONFIG))
    def run(table: str, config: Any) -> None:
        inside = config.get(table, {}) if isinstance(config, dict) else {}
        path.write_text(as_file(CONFIG | {table: inside}), encoding="utf-8", errors="replace")
        try:
            read_toml(path).decode()
        except UsageError:
            said = penumbra("run", str(path))
            assert said.code == 2
            used_or_refused(said, path)

    run()


# ---- recordings ----------------------------------------------------------------------------------


def test_a_damaged_recording_is_refused_in_one_line(penumbra: Penumbra) -> None:
    whole = (RECORDINGS / "pipeline.trace").read_bytes()
    path = Path("some.trace")

    @settings(max_examples=25, deadline=None)
    @given(spoilt(whole))
    def run(octets: bytes) -> None:
        path.write_bytes(octets)
        for words in (("trace", "info", str(path)), ("run", str(path))):
            said = penumbra(*words)
            assert said.code == 2  # checksums cover every byte
            used_or_refused(said, path)

    run()


LOG = b"""\
==7== Parent PID: 6
I  00108000,3
 S 04036ff0,4
SYSCALL[7,1](45) sys_brk ( 0x0 ) --> [pre-success] Success(0x4035000)
SYSCALL[7,1](252) exit_group( 0 ) --> [pre-success] Success(0x0)
"""


def test_a_damaged_log_is_imported_or_refused_in_one_line(penumbra: Penumbra) -> None:
    path = Path("some.log")

    @settings(max_examples=80, deadline=None)
    @given(spoilt(LOG))
    def run(octets: bytes) -> None:
        path.write_bytes(octets)
        Path("out.trace").unlink(missing_ok=True)
        said = penumbra("trace", "import", "--lackey", str(path), "-o", "out.trace")
        used_or_refused(said, path)
        assert Path("out.trace").exists() == (said.code == 0)

    run()
