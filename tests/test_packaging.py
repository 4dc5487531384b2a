"""What is built and installed is what stands in the tree, and the locks pin what is declared."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("actors", "guest", "hw")
LOCKS = ("requirements.lock", "requirements-dev.lock")
MADE_BY_TOOLS = shutil.ignore_patterns("__pycache__", "*.py[co]", ".*")

_BUILD = """
import sys
from setuptools import build_meta
print(build_meta.build_wheel(sys.argv[1]))
"""


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tree, with the setuptools of this environment."""
    top = tmp_path_factory.mktemp("wheel")
    source, out = top / "source", top / "out"
    source.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=MADE_BY_TOOLS)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def content(wheel: Path) -> dict[str, str]:
    """Return the wheel's metadata files by their bare name."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name.rpartition("/")[2]: archive.read(name).decode()
            for name in archive.namelist()
            if ".dist-info/" in name
        }


@pytest.mark.shows("K8")
def test_the_wheel_holds_every_file_of_the_tree_and_nothing_else(wheel: Path) -> None:
    in_tree = {
        f"penumbra/{path.relative_to(wheel.parent.parent / 'source').as_posix()}"
        for folder in FOLDERS
        for path in (wheel.parent.parent / "source" / folder).rglob("*")
        if path.is_file()
    }
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert in_wheel == in_tree
    assert {f"penumbra/{folder}/py.typed" for folder in FOLDERS} <= in_wheel


@pytest.mark.shows("K8")
def test_the_listed_packages_are_the_folders_that_hold_modules() -> None:
    in_tree = {
        ".".join(("penumbra", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert pyproject()["tool"]["setuptools"]["packages"] == sorted(in_tree)


@pytest.mark.shows("K8")
def test_the_metadata_says_what_is_needed_and_what_is_run(wheel: Path) -> None:
    files = content(wheel)
    metadata = message_from_string(files["METADATA"])
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert wheel.name == "penumbra_vm-0.1.0-py3-none-any.whl"
    assert (metadata["Name"], metadata["Version"]) == ("penumbra-vm", "0.1.0")
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("MIT", ">=3.11")
    assert {need.name: need.marker for need in needs} == {
        **dict.fromkeys(("anyio", "msgspec", "numpy", "rich", "trio")),
        **dict.fromkeys(("httpx", "starlette"), Marker('extra == "examples"')),
        **dict.fromkeys(("pycachesim", "thespian", "uvloop"), Marker('extra == "bench"')),
        "numba": Marker('extra == "fast"'),
        "unicorn": Marker('extra == "x86"'),
    }
    scripts = ConfigParser()
    scripts.read_string(files["entry_points.txt"])
    assert dict(scripts["console_scripts"]) == {"penumbra": "penumbra.actors.console.main:main"}
    assert "The Penumbra authors" in files["LICENSE"]


@pytest.mark.shows("K8")
def test_the_installed_packages_import_from_where_they_are_installed(
    wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    names = [f"penumbra.{folder}" for folder in FOLDERS]
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"import {', '.join(names)}\n"
        f"print(*(m.__file__ for m in ({', '.join(names)})), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert [Path(line) for line in done.stdout.splitlines()] == [
        tmp_path / "penumbra" / folder / "__init__.py" for folder in FOLDERS
    ]


def declared(lock: str) -> Iterator[Requirement]:
    """Yield what pyproject.toml asks of a lock: core and `fast`; for development all groups."""
    tables = pyproject()
    lists = [tables["project"]["dependencies"], tables["project"]["optional-dependencies"]["fast"]]
    groups = tables["dependency-groups"]
    chosen = groups if lock == "requirements-dev.lock" else ["build"]
    lists += [groups[name] for name in chosen]
    yield from (Requirement(line) for lines in lists for line in lines)


def pins(lock: str) -> dict[str, list[tuple[Version, int]]]:
    """Return each pinned distribution with its versions and the number of hashes of each."""
    text = (ROOT / lock).read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[tuple[Version, int]]] = {}
    for line in text.splitlines():
        name, version = re.match(r"([\w.-]+)==([^\s;]+)", line).groups()  # type: ignore[union-attr]
        hashes = line.count("--hash=sha256:")
        found.setdefault(canonicalize_name(name), []).append((Version(version), hashes))
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_all_that_is_declared_by_hash_and_names_no_index(lock: str) -> None:
    assert "://" not in (ROOT / lock).read_text(encoding="utf-8")
    pinned = pins(lock)
    assert [name for name, rows in pinned.items() if any(n == 0 for _, n in rows)] == []
    unmet = [
        str(need)
        for need in declared(lock)
        if not any(version in need.specifier for version, _ in pinned.get(need.name, []))
    ]
    assert unmet == []


def test_the_two_locks_agree_on_what_both_pin() -> None:
    core, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    assert core == {name: dev.get(name) for name in core}


def test_the_readme_gives_one_first_use_line_for_the_demo_and_one_for_the_tests() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first_use = "python3 -m pip install -q --target .tools rust-just uv && .tools/bin/just "
    lines = [line for line in text.splitlines() if line.startswith("python3 -m pip")]
    assert lines == [first_use + "demo", first_use + "test"]
