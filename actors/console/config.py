"""The configuration of a run: `[machine] [scheme] [workload] [costs]` and a seed, from TOML.

Command line over file over default. What is decoded is strict: a name that means nothing here is an
error that names the file and the place in it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from penumbra.actors.console.errors import COMMAND_LINE, UsageError
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.vmm.compose import order_named
from penumbra.actors.vmm.schemes import PATCH, PRESETS, Scheme
from penumbra.hw.costs import CostProfile, shipped_profiles

_MAX_SEED = (1 << 63) - 1
_MAX_CAPACITY = 1 << 16


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that determines a run, besides the contents of its workload.

    Attributes:
        seed: Of every choice that the machine makes.
        workload: `name` and parameters of a listed workload, or `trace`: a path. Beside them
            `content`: the hash that the contents must have, if it is to be this very workload.
    """

    seed: Annotated[int, msgspec.Meta(ge=0, le=_MAX_SEED)] = 0
    machine: MachineConfig = MachineConfig()
    scheme: Scheme = PATCH
    workload: dict[str, str | int | float | bool]
    costs: CostProfile = CostProfile()


@dataclass(frozen=True)
class Listed:
    """A scheme's table, and where it stands."""

    file: str
    place: str
    table: dict[str, Any]


@dataclass
class Source:
    """A configuration as given: not yet checked, nothing filled in.

    Attributes:
        file: What errors name: a file, or the command line.
        tables: Of the file, with the command line's settings in them.
        settings: Where the command line has set something, as `$.table.key`.
        listed: Schemes beside the presets, by name.
        scheme_from: Where `[scheme]` has come from, if not from the file.
    """

    file: str
    tables: dict[str, Any]
    settings: dict[str, str] = field(default_factory=dict)
    listed: dict[str, Listed] = field(default_factory=dict)
    scheme_from: Listed | None = None

    def set(self, path: str, value: Any, option: str) -> None:
        """Override one value; `option` is how the user said it."""
        *tables, key = path.split(".")
        table = self.tables
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise UsageError(COMMAND_LINE, option, f"{name} is no table")
        table[key] = value
        self.settings[f"$.{path}"] = option

    def error(self, path: str, cause: str) -> UsageError:
        """Return an error at `$.table.key`, naming whoever put the value there."""
        option = self.settings.get(path)
        if option is not None:
            return UsageError(COMMAND_LINE, option, cause)
        if self.scheme_from is not None and path.startswith("$.scheme"):
            place = self.scheme_from.place + path.removeprefix("$.scheme")
            return UsageError(self.scheme_from.file, place, cause)
        return UsageError(self.file, path, cause)

    def with_scheme(self, name: str, option: str) -> Source:
        """Return this source with another scheme: its own, one listed beside it, or a preset.

        What the command line has set about schemes stays set.
        """
        copy = Source(self.file, deepcopy(self.tables), dict(self.settings), self.listed)
        own = copy.tables.get("scheme", {})
        if isinstance(own, dict) and own.get("name") != name:
            copy.scheme_from = self.listed.get(name)
            if copy.scheme_from is None and name not in PRESETS:
                others = [own.get("name"), *self.listed]
                raise UsageError(COMMAND_LINE, option, _no_scheme(name, others))
            copy.tables["scheme"] = deepcopy(copy.scheme_from.table) if copy.scheme_from else {}
            for path in self.settings:
                if path.startswith("$.scheme."):
                    copy.set(path[2:], _at(self.tables, path[2:]), self.settings[path])
            copy.set("scheme.name", name, option)
        return copy

    def decode(self) -> RunConfig:
        """Return the configuration with all defaults; the workload's are not filled in.

        Raises:
            UsageError: Naming the first thing that is wrong.
        """
        tables = deepcopy(self.tables)
        tables["scheme"] = _whole_scheme(tables.get("scheme", {}))
        if "costs" in tables:
            tables["costs"] = self._whole_costs(tables["costs"])
        try:
            config = msgspec.convert(tables, RunConfig)
        except msgspec.ValidationError as error:
            cause, _, place = str(error).partition(" - at ")
            raise self.error(place.strip("`") or "$", cause) from None
        self._refuse_problems(config)
        return config

    def _whole_costs(self, given: Any) -> Any:
        """Return the table of costs on top of the shipped profile that it names, if it does."""
        if not isinstance(given, dict) or "profile" not in given:
            return given
        name, known = given["profile"], shipped_profiles()
        if not isinstance(name, str) or name not in known:
            cause = f"no cost profile is named {name!r} (known: {', '.join(known)})"
            raise self.error("$.costs.profile", cause)
        own = {key: value for key, value in given.items() if key != "profile"}
        return {**msgspec.to_builtins(known[name]), **own}

    def _refuse_problems(self, config: RunConfig) -> None:
        problem = config.machine.problem()
        if problem:
            place, _, cause = problem.partition(" is ")
            if not cause:
                place, _, cause = problem.partition(": ")
                raise self.error(f"$.{place}", cause)
            raise self.error(f"$.{place}", f"is {cause}")
        options = config.scheme.options
        if not 1 <= options.capacity <= _MAX_CAPACITY:
            place = "$.scheme.options.capacity"
            raise self.error(place, f"is {options.capacity}: must be 1 .. {_MAX_CAPACITY}")
        problem = config.scheme.problem()
        if problem:
            raise self.error("$.scheme", problem)
        try:
            order_named(options.order)
        except ValueError as error:
            raise self.error("$.scheme.options.order", str(error)) from None


def read_toml(path: Path) -> Source:
    """Read a configuration file."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(str(path), "read", error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise UsageError(str(path), f"byte {error.start}", "not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        cause, _, place = str(error).rpartition(" (at ")
        raise UsageError(str(path), place.rstrip(")"), cause or str(error)) from None
    except RecursionError:
        raise UsageError(str(path), "whole file", "nested too deeply") from None
    return Source(str(path), tables)


def apply_settings(source: Source, settings: Iterable[str]) -> None:
    """Put `table.key=value` settings into a configuration; a value is TOML, else a plain word."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        option = f"--set {setting}"
        if not equals or not all(path.split(".")):
            raise UsageError(COMMAND_LINE, option, "expected TABLE.KEY=VALUE")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        source.set(path, value, option)


def _whole_scheme(given: Any) -> Any:
    """Return a scheme's table on top of the preset of that name, if there is one."""
    if not isinstance(given, dict):
        return given
    name = given.get("name", PATCH.name)
    preset = PRESETS.get(name) if isinstance(name, str) else None
    whole: dict[str, Any] = {} if preset is None else msgspec.to_builtins(preset)
    options = given.get("options", {})
    if isinstance(options, dict):
        options = {**whole.get("options", {}), **options}
    return {**whole, "name": name, **given, "options": options}


def _at(tables: Mapping[str, Any], path: str) -> Any:
    value: Any = tables
    for key in path.split("."):
        value = value[key]
    return value


def _no_scheme(name: str, others: Iterable[object]) -> str:
    known = dict.fromkeys([*PRESETS, *(other for other in others if isinstance(other, str))])
    return f"no scheme is named {name!r} (known: {', '.join(known)})"
