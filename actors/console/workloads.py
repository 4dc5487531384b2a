"""What the word WORKLOAD on the command line, or the table `[workload]`, stands for."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

import penumbra.guest
from penumbra.actors.console.config import RunConfig, Source, read_toml
from penumbra.actors.console.errors import COMMAND_LINE, UsageError
from penumbra.actors.vmm.schemes import PRESETS
from penumbra.guest.traces import TraceError
from penumbra.guest.workloads import WORKLOADS
from penumbra.guest.workloads.workload import Workload, named_workload, recorded_workload
from penumbra.hw.costs import shipped_profiles


@dataclass(frozen=True)
class Chosen:
    """A workload that is ready to run, and `[workload]` with everything filled in."""

    workload: Workload
    table: dict[str, Any]


def find_source(word: str) -> Source:
    """Return the configuration that a WORKLOAD on the command line means.

    Raises:
        UsageError: It is neither a file nor a name.
    """
    path = Path(word)
    if path.is_dir() and (path / "config.toml").is_file():
        return read_toml(path / "config.toml")
    if path.suffix == ".toml":
        return read_toml(path)
    if path.suffix == ".trace" or path.is_file():
        source = Source(word, {})
        source.set("workload.trace", word, word)
        return source
    if "/" in word:
        raise UsageError(word, "read", "no such file")
    known = [*WORKLOADS, *shipped_recordings()]
    if word not in known:
        raise UsageError(COMMAND_LINE, "WORKLOAD", _unknown("workload or file", word, known))
    return Source(COMMAND_LINE, {"workload": {"name": word}})


@cache
def shipped_recordings() -> dict[str, Path]:
    """Return the recordings that come with the package, by name."""
    folders = (Path(entry) / "recordings" for entry in penumbra.guest.__path__)
    found = (path for folder in folders for path in folder.glob("*.trace"))
    return {path.stem: path for path in sorted(found)}


def parameters(name: str) -> dict[str, Any]:
    """Return the parameters of a listed workload with their defaults."""
    signature = inspect.signature(WORKLOADS[name][1])
    return {key: parameter.default for key, parameter in signature.parameters.items()}


def build(source: Source, config: RunConfig) -> Chosen:
    """Return the workload that a configuration names, checked against `content` if that is given.

    Raises:
        UsageError: It does not exist, is damaged, has other parameters or another content.
    """
    table = dict(config.workload)
    content = table.pop("content", None)
    chosen = _recorded(source, table) if "trace" in table else _listed(source, table)
    found = chosen.workload.content_hash
    if content is not None and content != found:
        raise source.error("$.workload.content", f"is {content}, but the content now is {found}")
    return Chosen(chosen.workload, chosen.table | {"content": found})


def _recorded(source: Source, table: dict[str, Any]) -> Chosen:
    given = table.pop("trace")
    if table:
        raise source.error(f"$.workload.{next(iter(table))}", "a trace has no parameters")
    if not isinstance(given, str):
        raise source.error("$.workload.trace", "expected a path")
    # A path in a file counts from that file, one on the command line from here.
    here = "$.workload.trace" in source.settings
    path = Path(given) if here else Path(source.file).parent / given
    return Chosen(_read(path), {"trace": str(path.absolute())})


def _read(path: Path) -> Workload:
    try:
        return recorded_workload(path)
    except OSError as error:
        raise UsageError(str(path), "read", error.strerror or str(error)) from None
    except TraceError as error:
        raise UsageError(error.file, error.place, error.cause) from None


def _listed(source: Source, table: dict[str, Any]) -> Chosen:
    name = table.pop("name", None)
    known = [*WORKLOADS, *shipped_recordings()]
    if name is None:
        raise source.error("$.workload", f"needs a name ({', '.join(known)}) or a trace")
    if name not in known or not isinstance(name, str):
        raise source.error("$.workload.name", _unknown("workload", str(name), known))
    if name in WORKLOADS:
        return _program(source, name, table)
    if table:
        raise source.error(f"$.workload.{next(iter(table))}", "a recording has no parameters")
    return Chosen(_read(shipped_recordings()[name]), {"name": name})


def _program(source: Source, name: str, table: dict[str, Any]) -> Chosen:
    defaults = parameters(name)
    for key, value in table.items():
        place = f"$.workload.{key}"
        if key not in defaults:
            raise source.error(place, _unknown(f"parameter of {name}", key, defaults))
        if type(value) is not type(defaults[key]):
            wanted, got = type(defaults[key]).__name__, type(value).__name__
            raise source.error(place, f"Expected `{wanted}`, got `{got}`")
    whole = defaults | table
    try:
        return Chosen(named_workload(name, **whole), {"name": name, **whole})
    except ValueError as error:
        raise source.error("$.workload", str(error)) from None


def schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, with the parameters of each workload."""
    whole = msgspec.json.schema(RunConfig)
    kinds = [_schema_of({"trace": {"type": "string"}}, "trace")]
    for name in (*WORKLOADS, *shipped_recordings()):
        properties: dict[str, Any] = {"name": {"const": name}}
        for key, default in (parameters(name) if name in WORKLOADS else {}).items():
            properties[key] = msgspec.json.schema(type(default)) | {"default": default}
        kinds.append(_schema_of(properties, "name"))
    whole["$defs"]["RunConfig"]["properties"]["workload"] = {"oneOf": kinds}
    whole["$defs"]["CostProfile"]["properties"]["profile"] = {"enum": list(shipped_profiles())}
    scheme = whole["$defs"]["Scheme"]
    composed = scheme | {"properties": scheme["properties"] | {"base": {"enum": [*PRESETS]}}}
    whole["$defs"]["RunConfig"]["properties"]["schemes"] = {"type": "array", "items": composed}
    return whole


def _schema_of(properties: dict[str, Any], required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties | {"content": {"type": "string"}},
        "required": [required],
        "additionalProperties": False,
    }


def _unknown(what: str, word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names) or 'none'}"
    return f"no {what} is named {word!r} ({hint})"
