"""Schemes are values: which compositions there are, and which cannot run."""

from __future__ import annotations

import msgspec
import pytest

from penumbra.actors.vmm.schemes import (
    NATIVE,
    NESTED,
    OUT_OF_SYNC,
    PATCH,
    PRESETS,
    SHOOTDOWN,
    VTLB,
    VTLB_EAGER,
    Scheme,
    SchemeOptions,
)


@pytest.mark.shows("S2")
def test_each_preset_runs_under_its_own_name() -> None:
    assert {"native", "shootdown", "patch", "vtlb", "vtlb-eager"} <= set(PRESETS)
    assert {name: scheme.name for name, scheme in PRESETS.items()} == {
        name: name for name in PRESETS
    }
    assert {scheme.problem() for scheme in PRESETS.values()} == {None}


@pytest.mark.shows("S1")
@pytest.mark.parametrize(
    ("scheme", "problem"),
    [
        (Scheme(name="x", detect="write-trace"), "without a shadow the other policies"),
        (Scheme(name="x", apply="update"), "without a shadow the other policies"),
        (Scheme(name="x", shadow="per-cpu"), "need detect, propagate and apply"),
        (msgspec.structs.replace(PATCH, detect="none"), "need detect, propagate and apply"),
        (msgspec.structs.replace(SHOOTDOWN, propagate="none"), "need detect, propagate and apply"),
        (msgspec.structs.replace(PATCH, options=SchemeOptions(capacity=0)), "1 .. 65536"),
        (msgspec.structs.replace(PATCH, options=SchemeOptions(capacity=1 << 17)), "1 .. 65536"),
        (msgspec.structs.replace(PATCH, options=SchemeOptions(shadow_pages=63)), "at least 64"),
        (msgspec.structs.replace(VTLB, options=SchemeOptions(shadow_pages=63)), "at least 64"),
        (msgspec.structs.replace(VTLB, detect="write-trace"), "a virtual TLB traces nothing"),
        (msgspec.structs.replace(VTLB, propagate="patch"), "a virtual TLB traces nothing"),
        (msgspec.structs.replace(VTLB, apply="update"), "apply must be 'invalidate'"),
        (msgspec.structs.replace(VTLB_EAGER, apply="invalidate"), "with eager fill 'update'"),
        (msgspec.structs.replace(VTLB, options=SchemeOptions(prefetch=-1)), "0 .. 1024"),
        (
            msgspec.structs.replace(VTLB, options=SchemeOptions(errata=("ET99",))),
            "no erratum 'ET99'",
        ),
        (
            msgspec.structs.replace(
                PATCH, options=SchemeOptions(channels="shared", in_use="outside")
            ),
            "options.in_use is a choice of 'pair' channels alone",
        ),
        (msgspec.structs.replace(NESTED, detect="write-trace"), "without a shadow the other"),
        (msgspec.structs.replace(OUT_OF_SYNC, options=SchemeOptions(unsync=1)), "options.unsync"),
        (msgspec.structs.replace(PATCH, options=SchemeOptions(prefetch=-1)), "options.prefetch"),
        (msgspec.structs.replace(OUT_OF_SYNC, shadow="shared"), "and in sync"),
        (
            msgspec.structs.replace(PATCH, options=SchemeOptions(root_cache=-1)),
            "options.root_cache",
        ),
        (
            msgspec.structs.replace(PATCH, options=SchemeOptions(flood=-1)),
            "options.flood must be 0",
        ),
    ],
)
def test_a_composition_that_cannot_run_says_why(scheme: Scheme, problem: str) -> None:
    said = scheme.problem()
    assert said is not None
    assert problem in said
    assert repr(scheme.name) in said


@pytest.mark.shows("S1")
def test_shadow_memory_of_a_scheme_without_shadows_does_not_matter() -> None:
    assert msgspec.structs.replace(NATIVE, options=SchemeOptions(shadow_pages=1)).problem() is None


@pytest.mark.shows("S1")
def test_a_scheme_goes_through_json_and_refuses_what_it_does_not_know() -> None:
    assert msgspec.json.decode(msgspec.json.encode(PATCH), type=Scheme) == PATCH
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"name": "x", "colour": "red"}', type=Scheme)
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value"):
        msgspec.json.decode(b'{"name": "x", "detect": "luck"}', type=Scheme)
