"""Schemes that a user composes: `[[schemes]]` in a configuration, or files of their own.

    [[schemes]]
    name = "patch-of-four"
    base = "patch"                # a listed scheme to start from; else all policies are `none`
    about = "channels that overflow"
    options = { capacity = 4 }

A file given by `--scheme-file` holds such tables, or one `[scheme]`, and nothing else. Whether a
composition can run is found out where every configuration is checked: in `Source.decode`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from penumbra.actors.console.config import Listed, Source, read_toml
from penumbra.actors.console.errors import UsageError
from penumbra.actors.vmm.schemes import PRESETS


def take_schemes(source: Source, files: Iterable[str]) -> None:
    """Move a configuration's `[[schemes]]`, and those of scheme files, to its listed schemes.

    Raises:
        UsageError: A table is none, lacks a name, or has one that is taken.
    """
    own = source.tables.get("scheme", {})
    taken = {own["name"]} if isinstance(own, dict) and isinstance(own.get("name"), str) else set()
    for listed in _tables(source.file, source.tables.pop("schemes", [])):
        _add(source, listed, taken)
    for file in files:
        for listed in read_schemes(Path(file)):
            _add(source, listed, taken)


def read_schemes(path: Path) -> list[Listed]:
    """Return the tables of a scheme file, with where each stands."""
    tables = read_toml(path).tables
    strange = sorted(tables.keys() - {"scheme", "schemes"})
    if strange:
        cause = "a scheme file holds [scheme] or [[schemes]] and nothing else"
        raise UsageError(str(path), f"$.{strange[0]}", cause)
    found = _tables(str(path), tables.get("schemes", []))
    if "scheme" in tables:
        found.append(_listed(str(path), "$.scheme", tables["scheme"]))
    if not found:
        raise UsageError(str(path), "whole file", "holds no scheme")
    return found


def _tables(file: str, given: Any) -> list[Listed]:
    if not isinstance(given, list):
        raise UsageError(file, "$.schemes", "expected an array of tables: [[schemes]]")
    return [_listed(file, f"$.schemes[{i}]", table) for i, table in enumerate(given)]


def _listed(file: str, place: str, table: Any) -> Listed:
    if not isinstance(table, dict):
        raise UsageError(file, place, "expected a table")
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise UsageError(file, f"{place}.name", "a scheme needs a name")
    if "," in name or name != name.strip():
        raise UsageError(file, f"{place}.name", f"{name!r} cannot be named on the command line")
    return Listed(file, place, _on_base(file, place, table))


def _on_base(file: str, place: str, table: dict[str, Any]) -> dict[str, Any]:
    """Return a scheme's table on top of the listed scheme that it names as its base."""
    given = dict(table)
    if "base" not in given:
        return given
    base = given.pop("base")
    if not isinstance(base, str) or base not in PRESETS:
        cause = f"no scheme is named {base!r} (known: {', '.join(PRESETS)})"
        raise UsageError(file, f"{place}.base", cause)
    whole: dict[str, Any] = msgspec.to_builtins(PRESETS[base])
    del whole["about"]
    options = given.get("options", {})
    if isinstance(options, dict):
        given["options"] = {**whole["options"], **options}
    return {**whole, **given}


def _add(source: Source, listed: Listed, taken: set[str]) -> None:
    name = listed.table["name"]
    if name in PRESETS:
        cause = f"{name!r} is the name of a listed scheme: take another, with base = {name!r}"
        raise UsageError(listed.file, f"{listed.place}.name", cause)
    if name in taken or name in source.listed:
        raise UsageError(listed.file, f"{listed.place}.name", f"{name!r} is the name of another")
    source.listed[name] = listed
