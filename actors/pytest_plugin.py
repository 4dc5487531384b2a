"""Machines, matrices and fabrics in other people's tests; a failure prints what replays it.

Enabled explicitly, `-p penumbra.actors.pytest_plugin`; loading it imports nothing heavy.

    async def test_it(machine):                       # under pytest-trio or anyio's plugin
        outcome = await machine("fork-storm", "shootdown", vcpus=4).run()
        assert outcome.summary["ended"] == "finished"

    @pytest.mark.penumbra_seed(1, 2, 3)               # three tests, one for each seed
    @pytest.mark.penumbra_matrix(n=2, capacity=1)
    def test_that(matrix, penumbra_seed): ...

    async def test_derived(fabric):                   # every read is compared with the primary data
        async with fabric(prices, workers=2) as running:
            prices.set("apple", 4)
            assert await label("apple") == "apple: 4"

A machine or a fabric runs in whatever event loop runs the test. It has its checker, and fails the
test at the first access that nothing allows, the first read that is stale. The seed comes from
`--penumbra-seed`, else from the marker, else it is 0. When a test that made machines fails, its
report tells each one's *replay token*, seed and hashes of configuration and workload, and the
command that runs it again. Given the token of a machine instead of a bare seed, `--penumbra-seed`
refuses a test that no longer makes that machine.

Nothing here ever starts an event loop, but for `run_blocking`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import pytest

if TYPE_CHECKING:
    from penumbra.actors.check import Oracle, Verdict
    from penumbra.actors.coherent import Fabric, Source
    from penumbra.actors.core import Matrix
    from penumbra.actors.machine.config import MachineConfig
    from penumbra.actors.machine.machine import Machine
    from penumbra.actors.vmm.schemes import Scheme
    from penumbra.guest.workloads.workload import Workload

PLUGIN: Final = "penumbra.actors.pytest_plugin"

# What a test of a second or two can afford; `parameters` replaces them.
SMALL: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType({
    "fork-storm": MappingProxyType({"depth": 1, "pages": 4, "rounds": 1}),
    "mmap-churn": MappingProxyType({"steps": 15, "pages": 6}),
    "shootdown-stress": MappingProxyType({"threads": 2, "rounds": 3, "pages": 2}),
})  # fmt: skip

_MAX_SEED: Final = (1 << 63) - 1
_TOKEN: Final = re.compile(r"s(\d+)-c([0-9a-f]{12})-w([0-9a-f]{12})")


class Token(NamedTuple):
    """What a machine is made of: its seed, and hashes of its configuration and its workload."""

    seed: int
    configuration: str
    workload: str

    def __str__(self) -> str:
        return f"s{self.seed}-c{self.configuration}-w{self.workload}"


class Incoherent(AssertionError):
    """The checker saw an access that nothing allows; the text tells the first ones."""


@dataclass(frozen=True)
class Outcome:
    """What a machine that has run to its end leaves.

    Attributes:
        summary: Deterministic and JSON-able: the same for the same token on any event loop.
        verdict: The checker's, None if it was off.
    """

    summary: dict[str, Any]
    verdict: Verdict | None


@dataclass
class BuiltMachine:
    """A machine with its checker, to be run once.

    Attributes:
        token: Seed and hashes; equal tokens run equally.
        about: The machine in one line, for the report.
    """

    machine: Machine
    oracle: Oracle | None
    token: Token
    about: str

    async def run(self, *, coherent: bool = True) -> Outcome:
        """Run to the end in the caller's event loop, trio's or asyncio's.

        Args:
            coherent: False lets violations pass, and the broken invariants that come with a fault
                switch: the caller looks at the verdict.

        Raises:
            Incoherent: The checker found a violation.
        """
        from penumbra.actors.machine.build import summarise

        await self.machine.run()
        verdict = self.oracle.verdict() if self.oracle else None
        if coherent:
            if verdict is not None and verdict.n_violations:
                raise Incoherent(f"{self.about}\n{verdict.explain()}")
            self.check()
        return Outcome(summarise(self.machine, self.token.seed), verdict)

    def run_blocking(self, loop: Literal["trio", "asyncio"] = "trio") -> Outcome:
        """Run to the end in an event loop of its own, in a test that is not asynchronous."""
        import anyio

        return anyio.run(self.run, backend=loop)

    def check(self) -> None:
        """Assert the invariants of every part; between exits."""
        machine = self.machine
        for submm in machine.submms:
            submm.check()
        for cpu in machine.cpus:
            cpu.tlb.check()
        machine.matrix.check()
        machine.memory.check()


@dataclass
class MachineMaker:
    """The fixture `machine`: builds small machines under the test's seed.

    Attributes:
        built: What the test has asked for so far.
    """

    seed: int
    built: list[BuiltMachine] = field(default_factory=list)

    def __call__(
        self,
        workload: str | Workload = "shootdown-stress",
        scheme: str | Scheme = "patch",
        *,
        parameters: Mapping[str, int] | None = None,
        options: Mapping[str, Any] | None = None,
        check: bool = True,
        **config: Any,
    ) -> BuiltMachine:
        """Put a machine together.

        Args:
            workload: A listed name, or a workload value.
            parameters: Of a listed workload; None = small ones.
            options: Scheme options to change, by name.
            config: Fields of `MachineConfig`; two VCPUs unless said otherwise.

        Raises:
            ValueError: No such workload, scheme, option or field, or they do not go together.
        """
        from penumbra.actors.machine.build import build_machine
        from penumbra.actors.machine.config import MachineConfig
        from penumbra.hw.costs import CostProfile

        made = workload
        if isinstance(made, str):
            made = _listed(made, parameters)
        elif parameters is not None:
            raise ValueError(f"parameters are given beside the workload value {made.name!r}")
        chosen = _scheme(scheme, options or {})
        machine_config = _changed("machine", MachineConfig(vcpus=2), config)
        machine, oracle = build_machine(
            machine_config, chosen, made, CostProfile(), self.seed, check=check
        )
        token = _token(self.seed, machine_config, chosen, made)
        told = {name: config[name] for name in sorted(config)} | {"check": check}
        about = f"{made.name}{dict(made.parameters)} under {chosen.name}, {told}"
        built = BuiltMachine(machine, oracle, token, about)
        self.built.append(built)
        return built


@pytest.fixture
def penumbra_seed(request: pytest.FixtureRequest) -> int:
    """Return the seed of this test: of the option, else of its marker, else 0."""
    if hasattr(request, "param"):
        return int(request.param)
    return _replayed(request.config).seed


@pytest.fixture
def machine(request: pytest.FixtureRequest, penumbra_seed: int) -> Iterator[MachineMaker]:
    """Return the maker of small machines: `machine(workload, scheme, **config)`."""
    maker = MachineMaker(penumbra_seed)
    request.node.stash[_MAKER] = maker
    yield maker
    for built in maker.built:
        built.machine.kernel.close()  # one that never ran still holds its guest's coroutines
    replayed = _replayed(request.config)
    if replayed.workload and all(built.token != replayed for built in maker.built):
        made = ", ".join(str(built.token) for built in maker.built) or "none"
        pytest.fail(f"no machine of this test is {replayed} any more; made: {made}", pytrace=False)


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> Iterator[Matrix]:
    """Return a matrix of patch channels, 2 x 2 of 8 slots unless the marker says otherwise.

    Its invariants are asserted when the test has passed.
    """
    from penumbra.actors.core import Matrix

    arguments: dict[str, Any] = {"n": 2, "capacity": 8}
    for marker in reversed(list(request.node.iter_markers("penumbra_matrix"))):
        if marker.args:
            raise pytest.UsageError("penumbra_matrix takes names: penumbra_matrix(n=2, capacity=1)")
        arguments |= marker.kwargs
    made = Matrix(**arguments)
    yield made
    made.check()


@dataclass
class FabricMaker:
    """The fixture `fabric`: runs checked fabrics of derived data; the seed orders their workers.

    Attributes:
        made: What the test has asked for so far.
    """

    seed: int
    made: list[Fabric] = field(default_factory=list)

    @asynccontextmanager
    async def __call__(
        self, *sources: Source[Any, Any], seeded: bool = True, **arguments: Any
    ) -> AsyncIterator[Fabric]:
        """Run a fabric of these sources for the block, in the caller's event loop.

        Each read of a view is checked; the invariants are asserted when the block ends well.

        Args:
            seeded: A conductor with the test's seed chooses which worker runs next, so that a
                failure can be replayed; False: the event loop does.
            arguments: Of `Fabric`, such as `workers`, `capacity` and `lazy`.

        Raises:
            StaleRead: A view gave what the primary data do not give.
            ValueError, TypeError: There is no such fabric.
        """
        from penumbra.actors.coherent import Fabric, checked
        from penumbra.actors.runtime import Conductor, LowestKey

        if seeded:
            arguments.setdefault("conductor", Conductor(LowestKey(self.seed)))
        running = Fabric(*sources, **arguments)
        self.made.append(running)
        async with running, checked(running):
            yield running
            running.check()


@pytest.fixture
def fabric(penumbra_seed: int) -> FabricMaker:
    """Return the maker of checked fabrics: `async with fabric(source, workers=2) as running`."""
    return FabricMaker(penumbra_seed)


# ---- hooks ---------------------------------------------------------------------------------------

_MAKER: Final = pytest.StashKey[MachineMaker]()
_REPLAYED: Final = pytest.StashKey[Token]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("penumbra").addoption(
        "--penumbra-seed",
        metavar="SEED|TOKEN",
        help="seed of every test that uses one, or a replay token out of a failure's report",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "penumbra_seed(*seeds): run the test once for each of these seeds"
    )
    config.addinivalue_line(
        "markers", "penumbra_matrix(**arguments): arguments of the fixture `matrix`"
    )
    _replayed(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("penumbra_seed")
    if marker is None:
        return
    if "penumbra_seed" not in metafunc.fixturenames:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: marked penumbra_seed, but uses no seed"
        )
    if metafunc.config.getoption("penumbra_seed") is None:
        seeds = [_seed_of(str(seed)) for seed in marker.args]
    else:
        seeds = [_replayed(metafunc.config).seed]
    metafunc.parametrize("penumbra_seed", seeds, indirect=True, ids=[f"seed{n}" for n in seeds])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    maker = item.stash.get(_MAKER, None)
    seed = maker.seed if maker else getattr(item, "funcargs", {}).get("penumbra_seed")
    if report.failed and seed is not None:
        report.sections.append(("penumbra replay", _replay_text(item, seed, maker)))
    return report


def _replay_text(item: pytest.Item, seed: int, maker: MachineMaker | None) -> str:
    """Say which machines the test made, and how to run it again."""
    built = maker.built if maker else []
    again = str(built[-1].token) if built else str(seed)
    _, colons, inner = item.nodeid.partition("::")
    node = os.path.relpath(item.path, item.config.invocation_params.dir) + colons + inner
    command = shlex.join(["python", "-m", "pytest", "-p", PLUGIN, f"--penumbra-seed={again}", node])
    return "\n".join([*(f"{one.token}  {one.about}" for one in built), f"replay: {command}"])


def _replayed(config: pytest.Config) -> Token:
    """Return the option's token; with a bare seed, or without the option, its hashes are empty."""
    if _REPLAYED not in config.stash:
        given = config.getoption("penumbra_seed")
        matched = _TOKEN.fullmatch(given or "")
        if matched:
            token = Token(_seed_of(matched[1]), matched[2], matched[3])
        else:
            token = Token(_seed_of(given or "0"), "", "")
        config.stash[_REPLAYED] = token
    return config.stash[_REPLAYED]


def _seed_of(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > _MAX_SEED:
        raise pytest.UsageError(f"penumbra seed {text!r}: neither 0 .. 2**63 - 1 nor a token")
    return int(text)


# ---- what a machine is made of -------------------------------------------------------------------


def _listed(name: str, parameters: Mapping[str, int] | None) -> Workload:
    from penumbra.guest.workloads.workload import named_workload

    return named_workload(name, **(SMALL.get(name, {}) if parameters is None else parameters))


def _scheme(scheme: str | Scheme, options: Mapping[str, Any]) -> Scheme:
    import msgspec

    from penumbra.actors.vmm.compose import order_named
    from penumbra.actors.vmm.schemes import PRESETS

    if isinstance(scheme, str):
        if scheme not in PRESETS:
            raise ValueError(f"no scheme {scheme!r} (known: {', '.join(PRESETS)})")
        scheme = PRESETS[scheme]
    changed = _changed("scheme options", scheme.options, options)
    order_named(changed.order)
    return msgspec.structs.replace(scheme, options=changed)


def _changed(what: str, value: Any, changes: Mapping[str, Any]) -> Any:
    """Replace fields of a configuration, with the types that its decoder asks for.

    Raises:
        ValueError: There is no such field, or it takes another type.
    """
    import msgspec

    tree = msgspec.to_builtins(value) | {
        name: msgspec.to_builtins(change) for name, change in changes.items()
    }
    try:
        return msgspec.convert(tree, type(value))
    except msgspec.ValidationError as error:
        raise ValueError(f"{what}: {error}") from None


def _token(seed: int, config: MachineConfig, scheme: Scheme, workload: Workload) -> Token:
    import msgspec

    parts = msgspec.json.encode([config, scheme])
    return Token(seed, _digest(parts), _digest(workload.content_hash.encode()))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
