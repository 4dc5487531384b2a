"""Which engine runs: what the environment asks for, else what is installed."""

from __future__ import annotations

import pytest

from penumbra.hw.compiled import ENGINE_VARIABLE, compile_all, engine_name, kernels_for
from penumbra.hw.formats import FORMATS, IA32

from .rig import ENGINES


@pytest.mark.parametrize("engine", ["plain", "numba"])
def test_the_environment_names_the_engine(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setenv(ENGINE_VARIABLE, engine)
    assert engine_name() == engine


@pytest.mark.parametrize("wish", [None, ""])
def test_without_a_wish_the_fastest_engine_installed_runs(
    monkeypatch: pytest.MonkeyPatch, wish: str | None
) -> None:
    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)
    if wish is not None:
        monkeypatch.setenv(ENGINE_VARIABLE, wish)
    assert engine_name() == ENGINES[-1]


@pytest.mark.parametrize("wish", ["Numba", "python", " plain"])
def test_an_unknown_engine_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv(ENGINE_VARIABLE, wish)
    with pytest.raises(ValueError, match=f"{ENGINE_VARIABLE}='{wish}': expected"):
        engine_name()


@pytest.mark.shows("H3")
@pytest.mark.parametrize("engine", ENGINES)
def test_kernels_are_built_once_per_format_and_engine(engine: str) -> None:
    built = [kernels_for(spec, engine) for spec in FORMATS.values()]
    assert [kernels.compiled for kernels in built] == [engine == "numba"] * len(FORMATS)
    assert kernels_for(IA32, engine) is built[0]
    assert len({id(kernels.functions) for kernels in built}) == len(FORMATS)


def test_every_format_can_be_warmed_up() -> None:
    compile_all()
