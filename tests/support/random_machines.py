"""Random configurations: one Hypothesis strategy over machine, scheme and workload.

A draw is a `RunConfig`, so what fails prints as the TOML file that `penumbra run` takes. Whatever a
configuration refuses by itself (`problem`, `machine_problem`) is not drawn.
"""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from penumbra.actors.console.config import RunConfig
from penumbra.actors.machine.config import MachineConfig
from penumbra.actors.observe import toml_text
from penumbra.actors.vmm.schemes import PRESETS, Scheme, SchemeOptions, WriteBufferOptions

# name -> parameters, so small that a machine of two VCPUs takes some tenths of a second
SMALL: dict[str, tuple[dict[str, int], ...]] = {
    "fork-storm": ({"depth": 1, "pages": 4, "rounds": 1}, {"depth": 2, "pages": 3, "rounds": 1}),
    "mmap-churn": ({"steps": 15, "pages": 6}, {"steps": 25, "pages": 3}),
    "shootdown-stress": (
        {"threads": 2, "rounds": 3, "pages": 2}, {"threads": 4, "rounds": 2, "pages": 3},
    ),
    "buffer-pool": ({"workers": 2, "updates": 6}, {"workers": 3, "updates": 3}),
    "process-switcher": (
        {"processes": 3, "regions": 4, "turns": 2}, {"processes": 2, "regions": 6, "turns": 3},
    ),
    "swap-thrash": (
        {"processes": 2, "threads": 2, "pages": 16, "rounds": 1},
        {"processes": 2, "threads": 1, "pages": 24, "rounds": 2},
    ),
    "page-splitting": (
        {"mib": 2, "rounds": 1, "threads": 2}, {"mib": 4, "rounds": 1, "threads": 2},
    ),
}  # fmt: skip
_PATCH_OPTIONS: dict[str, tuple[Any, ...]] = {
    "capacity": (1, 2, 3, 8, 64, 1024),
    "channels": ("pair", "pair", "pair-locked", "shared", "per-producer", "per-consumer"),
    "in_use": ("field", "field", "base", "outside"),
    "coalesce": ("update", "void", "never"),
    "postpone": ("leave", "store", "never"),
    "stale": ("derive", "invalidate"),
    "overflow": ("shootdown", "lost", "wait"),
    "derived": (True, False),
    "tell_all": (False, True),
}
_SHADOW_OPTIONS: dict[str, tuple[Any, ...]] = {
    "shadow_pages": (64, 80, 1024),
    "flood": (0, 0, 1, 3, 16),
    "prefetch": (0, 0, 1, 2, 8, 512),
    "prefetch_invlpg": (False, True),
    "root_cache": (None, None, 0, 1, 3),
    "share_roles": (True, True, False),
}
_VIRTUAL_TLB_OPTIONS: dict[str, tuple[Any, ...]] = {
    "drop": ("tied", "all"),
    "levels": ("all", "one"),
    "sharing": ("vcpu", "vm"),
    "working_set": (0, 1, 2, 16),
    "prefetch": (0, 0, 1, 4, 64),
    "shadow_pages": (64, 80, 1024),
}
_BUFFER_OPTIONS: dict[str, tuple[Any, ...]] = {
    "records": (1, 2, 7, 64, 1024),
    "overflow": ("exit", "lost"),
    "marks": ("tables", "writable"),
    "combines": (True, False),
}
_TLBS = ((8, 4), (8, 8), (8, 2), (16, 4), (64, 4), (512, 8), (1536, 12))
_MACHINE: dict[str, tuple[Any, ...]] = {
    "vcpus": (1, 2, 2, 3, 4, 4, 8, 16),
    "paging": ("ia32", "pae", "x86-64"),
    "psc_slots": (0, 1, 4, 16),
    "tlb": ("hardware", "hardware", "software"),
    "smt": (1, 1, 2, 4),
    "quantum": (50, 300, 1000, 10_000, 100_000),
    "timer_period": (700, 3000, 20_000, 100_000),
    "ipi_latency": (0, 10, 200, 2000),
    "guest_flush": ("eager", "eager", "quiesce", "batched", "lazy", "patch"),
    "control": ("assisted", "assisted", "deprivileged", "translated"),
    "spurious_faults": (False, False, False, True),
    "beyond_ram": ("ones", "ones", "machine-check"),
    "balloon_frames": (0, 0, 0, 16, 200),
}
_SEVERAL: dict[str, tuple[Any, ...]] = {
    "vms": (1, 1, 2, 3),
    "cpus": (0, 1, 2, 3),
    "slice": (300, 2000, 100_000),
    "skew": (0, 500, 200_000),
    "form": ("kernel", "hosted"),
    "applications": (0, 1, 2),
    "application_work": (5000,),
}
_PAGED: dict[str, tuple[Any, ...]] = {
    "user_frames": (16, 24, 40), "disk_mib": (1,), "disk_latency": (0, 100, 700, 5000),
}  # fmt: skip
_MOVING: dict[str, tuple[Any, ...]] = {
    "host_frames": (60, 90, 200), "host_moves": (200, 3000), "share_pages": (2000, 20_000),
}  # fmt: skip


@st.composite
def schemes(draw: DrawFn) -> Scheme:
    """Draw a preset with other options, or another composition of its policies."""
    preset = PRESETS[draw(st.sampled_from(sorted(PRESETS)))]
    options, policies = _options_of(draw, preset)
    given = {**msgspec.structs.asdict(preset.options), **options}
    return msgspec.structs.replace(preset, options=SchemeOptions(**given), **policies)


def _options_of(draw: DrawFn, preset: Scheme) -> tuple[dict[str, Any], dict[str, Any]]:
    if preset.shadow in ("none", "nested"):
        if preset.detect != "announced":
            return {}, {}
        options = _some_of(draw, _PATCH_OPTIONS)
        return {**options, **_one_of(draw, {"overflow": ("lost", "shootdown")})}, {}
    if preset.shadow == "per-privilege":
        return _some_of(draw, _VIRTUAL_TLB_OPTIONS), {}
    table = {**_SHADOW_OPTIONS, **(_PATCH_OPTIONS if preset.propagate == "patch" else {})}
    options = _some_of(draw, table)
    policies = _one_of(draw, {"apply": ("update", "invalidate")})
    if preset.detect == "write-buffer":
        options["buffer"] = WriteBufferOptions(**_some_of(draw, _BUFFER_OPTIONS))
        policies |= _one_of(draw, {"propagate": ("patch", "patch", "shootdown")})
    elif preset.detect == "out-of-sync":
        options |= _one_of(draw, {"unsync": (2, 3, 16, 1024)})
        policies |= _one_of(draw, {"propagate": ("shootdown", "patch")})
    else:
        policies |= _one_of(draw, {"shadow": ("per-cpu", "per-cpu", "shared")})
    return options, policies


@st.composite
def workloads(draw: DrawFn) -> dict[str, str | int | float | bool]:
    name = draw(st.sampled_from(sorted(SMALL)))
    return {"name": name, **draw(st.sampled_from(SMALL[name]))}


@st.composite
def machines(draw: DrawFn) -> MachineConfig:
    """Draw a machine; one in four pages to a disk, one in three has a kernel below.

    In one of four the machine frames behind guest frames change, where the scheme allows it.
    """
    entries, ways = draw(st.sampled_from(_TLBS))
    parts = {**_one_of(draw, _MACHINE), "tlb_entries": entries, "tlb_ways": ways}
    parts["max_progress"] = 5_000_000  # who gets nowhere ends by name
    if draw(st.integers(0, 2)) == 2:
        parts |= _some_of(draw, _SEVERAL)
    if draw(st.integers(0, 3)) == 3:
        parts |= _one_of(draw, _PAGED)
    if draw(st.integers(0, 3)) == 3:
        parts |= _some_of(draw, _MOVING)
    return MachineConfig(**parts)


@st.composite
def _any_cases(draw: DrawFn) -> RunConfig:
    case = RunConfig(
        seed=draw(st.integers(0, 1000)),
        machine=draw(machines()),
        scheme=draw(schemes()),
        workload=draw(workloads()),
    )
    # Checks the names of choices, as reading the file would.
    return msgspec.convert(msgspec.to_builtins(case), RunConfig)


def cases() -> SearchStrategy[RunConfig]:
    """Return the strategy over all that can be built."""
    return _any_cases().filter(lambda case: refusal(case) is None)


def refusal(case: RunConfig) -> str | None:
    """Say why a machine refuses to be built so, or None."""
    machine, scheme = case.machine, case.scheme
    return machine.problem() or scheme.problem() or scheme.machine_problem(machine.tlb)


def drawn(number: int) -> RunConfig:
    """Return draw number `number`, always the same one for the same version of the strategy."""
    found: list[RunConfig] = []

    # Hypothesis begins with the simplest value and varies what it had: the second is a fresh one.
    @seed(number)
    @settings(
        max_examples=2, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )  # fmt: skip
    @given(cases())
    def keep(case: RunConfig) -> None:
        found.append(case)

    keep()
    return found[-1]


def token(case: RunConfig) -> str:
    """Return the TOML file that replays a draw: `penumbra run FILE`."""
    tables: dict[str, Any] = {"seed": case.seed, "workload": dict(case.workload)}
    tables["machine"] = _differing(case.machine, MachineConfig())
    base = PRESETS.get(case.scheme.name, Scheme(name=""))
    tables["scheme"] = {"name": case.scheme.name, **_differing(case.scheme, base)}
    return toml_text(tables)


def _differing(one: msgspec.Struct, other: msgspec.Struct) -> dict[str, Any]:
    """Return the fields in which `one` is not as `other`, tables within tables."""
    found: dict[str, Any] = {}
    for name in one.__struct_fields__:
        mine, its = getattr(one, name), getattr(other, name)
        if mine != its:
            found[name] = _differing(mine, its) if isinstance(mine, msgspec.Struct) else mine
    return found


def _one_of(draw: DrawFn, table: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: draw(st.sampled_from(values)) for name, values in table.items()}


def _some_of(draw: DrawFn, table: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Draw values for about half of the names, so that the default keeps its share."""
    names = [name for name in table if draw(st.booleans())]
    return _one_of(draw, {name: table[name] for name in names})
