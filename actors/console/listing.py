"""`penumbra list` and `penumbra schema`: what can be named in a configuration."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from penumbra.actors.console.compositions import take_schemes
from penumbra.actors.console.config import Source
from penumbra.actors.console.errors import COMMAND_LINE, UsageError
from penumbra.actors.console.printing import print_json
from penumbra.actors.console.tables import Grid, Paper, count
from penumbra.actors.console.workloads import parameters, shipped_recordings
from penumbra.actors.console.workloads import schema as config_schema
from penumbra.actors.core import SWITCHES
from penumbra.actors.vmm.buffer_faults import BUFFER_FAULTS
from penumbra.actors.vmm.schemes import PRESETS, Scheme, SchemeOptions
from penumbra.actors.vmm.vtlb.errata import ERRATA
from penumbra.guest.kernel.bugs import GUEST_BUGS
from penumbra.guest.traces import TraceError, info, read_recording
from penumbra.guest.workloads import WORKLOADS
from penumbra.hw.costs import CostProfile, prices, shipped_profiles

Row = dict[str, Any]

_POLICIES = ("name", "detect", "propagate", "apply", "shadow")


def listing(arguments: argparse.Namespace) -> int:
    """Print one list, or all of them."""
    lists = {
        "workloads": _workloads,
        "recordings": _recordings,
        "schemes": _schemes,
        "costs": _costs,
        "profiles": _profiles,
        "faults": _faults,
    }
    chosen = [arguments.what] if arguments.what else list(lists)
    source = Source(COMMAND_LINE, {"workload": {}})
    take_schemes(source, arguments.scheme_files)
    tables = {name: lists[name]() for name in chosen}
    if "schemes" in tables:
        composed = (source.with_scheme(name, "list").decode().scheme for name in source.listed)
        tables["schemes"] += [_scheme(one) for one in composed]
    if arguments.json:
        print_json(tables)
    elif arguments.quiet:
        for rows in tables.values():
            for row in rows:
                print(row["name"])
    else:
        _print(tables)
    return 0


def schema(arguments: argparse.Namespace) -> int:
    """Print the JSON schema of the configuration file; JSON, whether asked for or not."""
    del arguments  # nothing to choose
    print_json(config_schema())
    return 0


def _print(tables: dict[str, list[Row]]) -> None:
    paper = Paper()
    for number, (name, rows) in enumerate(tables.items()):
        if number:
            paper.line()
        columns = list(rows[0]) if rows else ["name"]
        n_left = len(columns)
        grid = Grid(name, columns, left=n_left)
        for row in rows:
            grid.rows.append([_text(row[column]) for column in columns])
        paper.grid(grid)
    if "faults" in tables:
        paper.line("orders of the patch channel: --set scheme.options.order=NAME or NAME+NAME")
        paper.line("of guest write buffers: --set scheme.options.buffer.fault=NAME or NAME+NAME")
        paper.line("a virtual TLB as printed: --set 'scheme.options.errata=[\"ET1\"]'")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_word(item)}" for key, item in value.items()) or "-"
    return count(value) if isinstance(value, int) else str(value)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _workloads() -> list[Row]:
    return [
        {"name": name, "parameters": parameters(name), "about": about}
        for name, (about, _) in WORKLOADS.items()
    ]


def _recordings() -> list[Row]:
    rows = []
    for name, path in shipped_recordings().items():
        try:
            facts = info(read_recording(path))
        except TraceError as error:
            raise UsageError(error.file, error.place, error.cause) from None
        keys = ("processes", "bits", "references", "provenance")
        rows.append({"name": name} | {key: facts[key] for key in keys})
    return rows


def _schemes() -> list[Row]:
    return [_scheme(preset) for preset in PRESETS.values()]


def _scheme(scheme: Scheme) -> Row:
    """Return a composition: its four policies, and the options that are not the default."""
    row: Row = {key: getattr(scheme, key) for key in _POLICIES}
    return row | {"options": changed_options(scheme.options), "about": scheme.about}


def changed_options(options: SchemeOptions) -> dict[str, Any]:
    """Return the options that differ from the default, by name."""
    default = msgspec.to_builtins(SchemeOptions())
    return {k: v for k, v in msgspec.to_builtins(options).items() if v != default[k]}


def _costs() -> list[Row]:
    """List the prices of each profile, in cycles; `source` says whence they are."""
    profiles = {"default": CostProfile(), **shipped_profiles()}
    return [
        {"name": name, **{key: getattr(profile, name) for key, profile in profiles.items()}}
        for name in prices(CostProfile())
    ]


def _profiles() -> list[Row]:
    profiles = {"default": CostProfile(), **shipped_profiles()}
    return [{"name": name, "source": profile.source} for name, profile in profiles.items()]


def _faults() -> list[Row]:
    """List the switches: patch channel's order, guest's kernel, virtual TLB as printed."""
    rows = [
        {
            "name": name,
            "kind": switch.kind.value,
            "shows on": switch.shows.value,
            "place": switch.place,
            "what": switch.line,
        }
        for name, switch in SWITCHES.items()
    ]
    rows += [
        {
            "name": name,
            "kind": "printed" if row.printed else "fault",
            "shows on": "sc",
            "place": row.place,
            "what": f"{row.line} ({row.erratum})",
        }
        for name, row in BUFFER_FAULTS.items()
    ]
    rows += [
        {"name": name, "kind": "guest bug", "shows on": "-", "place": "guest kernel", "what": line}
        for name, line in GUEST_BUGS.items()
    ]
    for name, line in ERRATA.items():
        place, _, what = line.partition(": ")
        kind = "as printed"
        rows.append({"name": name, "kind": kind, "shows on": "-", "place": place, "what": what})
    return rows
