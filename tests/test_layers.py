"""Imports point down the floors, and rooms that must not wait do not: read from the syntax trees.

Floors, top down: console; lab; machine; vmm | guest | coherent, processes;
hw | core | check | observe | runtime. An import counts wherever it stands: in a
function and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("actors", "guest", "hw")

BOTTOM = {"hw", "core", "check", "observe"}
BELOW_MACHINE = BOTTOM | {"runtime", "vmm", "guest"}
BELOW_CONSOLE = BELOW_MACHINE | {"machine", "lab", "coherent"}

MAY_IMPORT: dict[str, set[str]] = {
    "hw": set(),
    "core": set(),
    "check": set(),
    "observe": set(),
    "runtime": set(),
    "guest": {"hw"},
    "vmm": BOTTOM,
    "coherent": {"core", "runtime"},
    "processes": {"core", "runtime"},
    "machine": BELOW_MACHINE,
    "lab": BELOW_MACHINE | {"machine"},
    "console": BELOW_CONSOLE,
    "pytest_plugin": BELOW_CONSOLE,
    # `import penumbra.actors.core` runs this one too: what it imported, every room would import.
    "actors": set(),
}

NEVER_WAITS = {"hw", "core", "vmm", "check", "observe"}
EVENT_LOOPS = {"trio", "anyio", "asyncio"}
# Guest coroutines await operations, not a loop. The first three run on whatever anyio runs on.
LOOPS_ALLOWED: dict[str, set[str]] = {
    "runtime": {"anyio"},
    "machine": {"anyio"},
    "coherent": {"anyio"},
    "processes": {"anyio"},
    "lab": EVENT_LOOPS,
    "console": EVENT_LOOPS,
    "pytest_plugin": EVENT_LOOPS,
}
CHECK_MAY_IMPORT = {"numpy", "msgspec"}

_WAITING = ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith


@dataclass(frozen=True)
class Source:
    """One module: its dotted name under `penumbra`, whether it is a package, and its tree."""

    name: str
    is_package: bool
    tree: ast.Module

    @property
    def room(self) -> str:
        """Return the room the module stands in."""
        return room_of(self.name)

    def imports(self) -> Iterator[str]:
        """Yield the dotted names imported; `from a import b` gives `a.b`: b may be a module."""
        package = self.name if self.is_package else self.name.rpartition(".")[0]
        for node in ast.walk(self.tree):
            match node:
                case ast.Import(names=names):
                    yield from (alias.name for alias in names)
                case ast.ImportFrom(module=module, names=names, level=level):
                    base = resolve_name("." * level + (module or ""), package)
                    yield from (f"{base}.{alias.name}" for alias in names)
                case ast.Call(
                    func=ast.Name(id="import_module" | "__import__")
                    | ast.Attribute(attr="import_module"),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    yield resolve_name(name, package)
                case _:
                    pass


def room_of(name: str) -> str:
    """Name the room of a dotted `penumbra` name: `hw`, `guest`, or what stands under `actors`."""
    parts = name.split(".")[1:]
    if parts[:1] == ["actors"] and len(parts) > 1:
        return parts[1]
    return parts[0]


def parsed(path: str, text: str) -> Source:
    """Parse a module by its path in the tree."""
    parts = ("penumbra", *Path(path).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    return Source(".".join(parts[:-1] if is_package else parts), is_package, ast.parse(text))


def whole_tree() -> list[Source]:
    """Parse every module of the three folders."""
    return [
        parsed(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def rooms_imported(source: Source) -> set[str]:
    """Return the rooms of `penumbra` that a module imports from, its own left out.

    A name taken from `penumbra.actors` itself is a room's when there is one of that name.
    """
    rooms = {room_of(name) for name in source.imports() if name.startswith("penumbra.")}
    return rooms - {source.room}


def loops_allowed(source: Source) -> set[str]:
    """Return the event loops a module may import.

    Trio's own form of streams stands in modules of its own, named so: `runtime/trio_*.py`.
    """
    if source.room == "runtime" and source.name.rpartition(".")[2].startswith("trio_"):
        return {"anyio", "trio"}
    return LOOPS_ALLOWED.get(source.room, set())


def faults(source: Source) -> Iterator[str]:
    """Yield what in one module breaks the rules of its room."""
    room, here = source.room, f"{source.name}: {source.room}"
    if room not in MAY_IMPORT:
        yield f"{here}: no such room; add it to the floors in this test"
        return
    tops = {name.partition(".")[0] for name in source.imports()}
    refused = rooms_imported(source) - MAY_IMPORT[room]
    refused |= tops & EVENT_LOOPS - loops_allowed(source)
    if room == "check":
        refused |= tops - CHECK_MAY_IMPORT - {"penumbra"} - sys.stdlib_module_names
    yield from (f"{here} must not import {name}" for name in sorted(refused))
    yield from (f"{here} imports {name} by its bare name" for name in sorted(tops & {*FOLDERS}))
    if room in NEVER_WAITS:
        waits = (node for node in ast.walk(source.tree) if isinstance(node, _WAITING))
        yield from (f"{here} must not wait (line {node.lineno})" for node in waits)


def test_every_module_keeps_the_rules_of_its_room() -> None:
    assert [fault for source in whole_tree() for fault in faults(source)] == []


def test_no_two_rooms_import_each_other_in_a_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for source in whole_tree():
        arrows.setdefault(source.room, set()).update(rooms_imported(source))
    order = list(graphlib.TopologicalSorter(arrows).static_order())
    assert set(order) >= set(FOLDERS)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("hw/mmu.py", "from penumbra.guest import kernel", "hw must not import guest"),
        ("hw/mmu.py", "from ..guest.kernel import Kernel", "hw must not import guest"),
        ("hw/mmu.py", "async def walk(): pass", "hw must not wait"),
        ("guest/kernel.py", "import trio", "guest must not import trio"),
        ("guest/kernel.py", "from penumbra.actors.vmm import exits", "guest must not import vmm"),
        ("guest/kernel.py", "import hw", "by its bare name"),
        ("actors/core/channel.py", "import penumbra.hw.memory", "core must not import hw"),
        ("actors/core/channel.py", "from .. import vmm", "core must not import vmm"),
        ("actors/core/channel.py", "def f():\n import anyio.abc", "core must not import anyio"),
        ("actors/check/walk.py", "from penumbra.hw.formats import P", "check must not import hw"),
        ("actors/check/walk.py", "import numba", "check must not import numba"),
        ("actors/runtime/conductor.py", "import trio", "runtime must not import trio"),
        (
            "actors/runtime/__init__.py",
            "from ..vmm import x",
            "must not import vmm",
        ),
        ("actors/observe/run.py", "importlib.import_module('penumbra.hw')", "observe must not"),
        ("actors/machine/vcpu.py", "from ..console.main import main", "must not import console"),
        ("actors/__init__.py", "from .core import Patch", "actors must not import core"),
        ("actors/attic/x.py", "", "no such room"),
    ],
)
def test_an_import_against_the_arrows_is_found(path: str, text: str, expected: str) -> None:
    found = list(faults(parsed(path, text)))
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "guest/kernel.py",
            "from penumbra.hw.operations import Load\nasync def f(): await Load()",
        ),
        ("actors/machine/vcpu.py", "import anyio\nfrom ..vmm import exits\nfrom ..core import x"),
        ("actors/runtime/trio_channel.py", "import trio\nfrom .mailbox import Mailbox"),
        ("actors/check/walk.py", "import numpy as np\nimport struct\nfrom . import bits"),
        ("actors/console/main.py", "def main():\n import trio\n from ..machine import world"),
    ],
)
def test_an_import_along_the_arrows_is_let_pass(path: str, text: str) -> None:
    assert list(faults(parsed(path, text))) == []


_HEAVY_AFTER = """
import sys
from penumbra.actors.console.main import main
sys.argv = ["penumbra", sys.argv[1]]
try:
    status = main()
except SystemExit as end:
    status = end.code
heavy = {"trio", "anyio", "numpy", "numba"} & set(sys.modules)
print("status", status or 0, "heavy", sorted(heavy))
"""


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_answers_help_and_version_without_loading_anything_heavy(option: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", _HEAVY_AFTER, option],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert "penumbra" in done.stdout
    assert done.stdout.splitlines()[-1] == "status 0 heavy []"
