"""The pytest plugin, seen from outside: test files of a stranger, run by pytest."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

# Loaded before an inner run, which forgets what it was first to load: numpy refuses that.
import penumbra.actors.machine.run  # noqa: F401
from penumbra.actors import pytest_plugin as plugin

pytest_plugins = ("pytester",)

FLAGS = ("-p", plugin.PLUGIN, "-p", "no:cacheprovider")
NO_TRIO = ("-p", "no:trio")

# Absolute, for a process that starts in the folder of the inner run.
PYTHONPATH = os.pathsep.join(
    str(Path(path).absolute())
    for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if path
)

TOKEN = re.compile(r"s\d+-c[0-9a-f]{12}-w[0-9a-f]{12}")


def tokens_of(result: pytest.RunResult) -> list[str]:
    """Return the replay tokens printed, without the command's."""
    return [line.split()[0] for line in result.outlines if TOKEN.match(line)]


def command_of(result: pytest.RunResult) -> list[str]:
    """Return the words of the replay command printed."""
    [line] = [line for line in result.outlines if line.startswith("replay: ")]
    return shlex.split(line.removeprefix("replay: "))


def summary_of(result: pytest.RunResult) -> dict[str, int]:
    return {k: n for k, n in result.parseoutcomes().items() if k not in ("warning", "warnings")}


@pytest.mark.shows("K7")
def test_a_machine_and_a_matrix_serve_pytest_trio_with_a_clock_that_jumps(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("""
        import pytest, trio

        @pytest.mark.trio
        async def test_machine(machine, autojump_clock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, 3600)
                outcome = await machine(vcpus=2).run()
            assert outcome.summary["ended"] == "finished"
            assert outcome.verdict.n_violations == 0 and outcome.verdict.n_references > 0
            assert trio.current_time() >= 3600

        @pytest.mark.trio
        async def test_matrix(matrix, autojump_clock):
            producer, consumer = matrix.producer(0), matrix.consumer(1)

            async def store():
                producer.begin([(0, 8)])
                producer.stored()
                await trio.sleep(60)
                producer.post_nowait(1, 0, 8)
                producer.end()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(store)
                await trio.testing.wait_all_tasks_blocked()
                assert [patch.number for patch in consumer.event().patches] == [-1]
                await trio.sleep(61)
            assert [patch.number for patch in consumer.event().patches] == [0]
    """)
    assert summary_of(pytester.runpytest_inprocess(*FLAGS)) == {"passed": 2}


@pytest.mark.shows("K7", "K5")
def test_a_machine_runs_under_anyios_plugin_and_ends_equally_on_both_loops(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("""
        import anyio, pytest, sniffio

        SEEN = {}

        @pytest.mark.anyio
        async def test_machines(machine, matrix, anyio_backend_name):
            ends = []

            async def run(scheme):
                outcome = await machine("mmap-churn", scheme).run()
                ends.append((scheme, outcome.summary))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run, "patch")
                tasks.start_soon(run, "shootdown")
            assert sniffio.current_async_library() == anyio_backend_name
            assert matrix.count == 1
            SEEN[anyio_backend_name] = sorted(ends, key=lambda end: end[0])

        def test_the_loops_agree():
            assert sorted(SEEN) == ["asyncio", "trio"]
            assert SEEN["asyncio"] == SEEN["trio"]
    """)
    result = pytester.runpytest_inprocess(*FLAGS, *NO_TRIO)
    assert summary_of(result) == {"passed": 3}


PRICES = """
import pytest
from penumbra.actors.coherent import Source, StaleRead

def shop():
    prices = Source("prices", {"apple": 3, "pear": 5})

    @prices.view()
    async def label(sku):
        return f"{sku}: {prices[sku]}"

    return prices, label
"""


@pytest.mark.shows("K7", "P11")
def test_a_fabric_serves_pytest_trio_with_a_clock_that_jumps(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        PRICES
        + """
import trio
from penumbra.actors.coherent import NotSettled

@pytest.mark.trio
async def test_labels(fabric, autojump_clock):
    prices, label = shop()
    async with fabric(prices, workers=2, capacity=1) as running:
        copies = [label.at(worker) for worker in running.workers]

        async def change():
            await trio.sleep(60)
            prices.set("apple", 4)
            prices.set("pear", 6)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            assert [await copy("apple") for copy in copies] == ["apple: 3"] * 2
            await trio.sleep(61)
        await prices.settled(prices.version, within=1)
        assert [await copy("apple") for copy in copies] == ["apple: 4"] * 2
        assert running.checker.n_checked == 4
    assert trio.current_time() >= 61

@pytest.mark.trio
async def test_a_version_that_nobody_applies(fabric, autojump_clock):
    prices, label = shop()
    async with fabric(prices, lazy=True):
        await label("apple")
        version = prices.set("apple", 4)
        with pytest.raises(NotSettled):
            await prices.settled(version, within=3600)
    assert trio.current_time() >= 3600
"""
    )
    assert summary_of(pytester.runpytest_inprocess(*FLAGS)) == {"passed": 2}


@pytest.mark.shows("K7", "K5", "P11")
def test_fabrics_run_under_anyios_plugin_beside_a_machine(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        PRICES
        + """
import anyio, sniffio

@pytest.mark.anyio
async def test_two_and_a_machine(fabric, machine, anyio_backend_name):
    shops = [shop(), shop()]
    ends = []

    async def run():
        ends.append((await machine("mmap-churn").run()).summary["ended"])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        async with fabric(shops[0][0], workers=3), fabric(shops[1][0], seeded=False):
            for prices, label in shops:
                await label("pear")
                await prices.settled(prices.set("pear", 7), within=5)
                assert await label("pear") == "pear: 7"
    assert ends == ["finished"]
    assert sniffio.current_async_library() == anyio_backend_name
    assert [made.name for made in fabric.made] == ["fabric", "fabric"]
"""
    )
    result = pytester.runpytest_inprocess(*FLAGS, *NO_TRIO)
    assert summary_of(result) == {"passed": 2}


@pytest.mark.shows("K7")
def test_a_read_that_is_stale_fails_the_test_and_its_seed_is_told(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        PRICES
        + """
import anyio

@pytest.mark.penumbra_seed(4)
def test_labels(fabric, penumbra_seed):
    assert fabric.seed == penumbra_seed

    async def main():
        prices = Source("prices", {"apple": 3})
        unwatched = {"apple": 3}  # a derivation that reads past the source is never told

        @prices.view()
        async def label(sku):
            return f"{sku}: {unwatched[sku]}"

        async with fabric(prices):
            await label("apple")
            unwatched["apple"] = 4
            await label("apple")

    anyio.run(main)
"""
    )
    result = pytester.runpytest_inprocess(*FLAGS)
    assert summary_of(result) == {"failed": 1}
    result.stdout.fnmatch_lines(["*StaleRead*", "replay: *--penumbra-seed=4 *test_labels*"])


@pytest.mark.shows("K7")
def test_a_failure_prints_tokens_and_a_command_that_fails_in_the_same_way(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    pytester.makepyfile("""
        import pytest

        @pytest.mark.penumbra_seed(3, 5)
        def test_costs(machine, penumbra_seed):
            machine("mmap-churn", "native")
            built = machine("shootdown-stress", options={"capacity": 2})
            assert penumbra_seed == 3, f"progress {built.run_blocking().summary['progress']}"
    """)
    first = pytester.runpytest_inprocess(*FLAGS)
    assert summary_of(first) == {"passed": 1, "failed": 1}
    assert "penumbra replay" in first.stdout.str()
    native, stress = tokens_of(first)
    assert native != stress
    assert native.startswith("s5-c")
    command = command_of(first)
    assert command[:3] == ["python", "-m", "pytest"]
    assert command[-1].endswith("::test_costs[seed5]")
    assert f"--penumbra-seed={stress}" in command

    again = pytester.run(sys.executable, "-P", *command[1:])
    assert summary_of(again) == {"failed": 1}
    assert tokens_of(again) == [native, stress]
    progress = re.compile(r"^E +AssertionError: progress \d+", re.MULTILINE)
    assert progress.findall(first.stdout.str()) == progress.findall(again.stdout.str()) != []


@pytest.mark.shows("K7")
def test_a_token_of_another_machine_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        def test_small(machine):
            machine("mmap-churn")
    """)
    token = "s1-c000000000000-w000000000000"
    result = pytester.runpytest_inprocess(*FLAGS, f"--penumbra-seed={token}")
    assert summary_of(result) == {"passed": 1, "errors": 1}
    result.stdout.fnmatch_lines([f"*no machine of this test is {token} any more; made: s1-c*"])


@pytest.mark.shows("K7")
def test_what_the_checker_finds_fails_the_test_unless_it_wants_to_look(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("""
        import anyio, functools

        def broken(machine):
            return machine(options={"order": "left_unmarked"})

        def test_takes_no_notice(machine):
            broken(machine).run_blocking()

        def test_looks(machine):
            run = functools.partial(broken(machine).run, coherent=False)
            assert anyio.run(run).verdict.n_violations > 0
    """)
    result = pytester.runpytest_inprocess(*FLAGS)
    assert summary_of(result) == {"passed": 1, "failed": 1}
    result.stdout.fnmatch_lines(["*Incoherent: shootdown-stress*", "*VCPU *"])


def test_the_option_takes_the_place_of_every_seed_and_the_default_is_zero(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("""
        import pytest

        @pytest.mark.penumbra_seed(1, 2, 3)
        def test_many(penumbra_seed):
            print("many", penumbra_seed)

        def test_one(machine, penumbra_seed):
            print("one", machine.seed, penumbra_seed)
    """)

    def seeds(*arguments: str) -> list[str]:
        result = pytester.runpytest_inprocess(*FLAGS, "-s", "-q", *arguments)
        return [
            found[1]
            for line in result.outlines
            if (found := re.fullmatch(r"\.?((?:many|one) \d.*)", line))
        ]

    assert seeds() == ["many 1", "many 2", "many 3", "one 0 0"]
    assert seeds("--penumbra-seed=9") == ["many 9", "one 9 9"]


@pytest.mark.parametrize("seed", ["-1", "x", "9223372036854775808", "s1-c12-w34", " 7", "٣"])
def test_a_seed_that_is_none_is_refused_in_one_line(pytester: pytest.Pytester, seed: str) -> None:
    result = pytester.runpytest_inprocess(*FLAGS, f"--penumbra-seed={seed}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line.strip()] == [
        f"ERROR: penumbra seed {seed!r}: neither 0 .. 2**63 - 1 nor a token"
    ]


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        ("machine('no-such')", "no workload 'no-such'"),
        ("machine(scheme='no-such')", "no scheme 'no-such'"),
        ("machine(vcpus='two')", "machine: Expected `int`, got `str`"),
        ("machine(cores=2)", "machine: Object contains unknown field `cores`"),
        ("machine(vcpus=99)", "machine.vcpus"),
        ("machine(options={'order': 'no-such'})", "no patch order switch 'no-such'"),
        ("machine(options={'capacity': 0})", "options.capacity"),
        ("machine(parameters={'no': 1})", "unexpected keyword argument 'no'"),
    ],
)
def test_a_machine_that_cannot_be_is_refused_by_name(call: str, cause: str) -> None:
    maker = plugin.MachineMaker(0)
    with pytest.raises(ValueError, match=re.escape(cause)):
        eval(call, {"machine": maker})
    assert maker.built == []


@pytest.mark.shows("K7")
def test_the_matrix_is_made_as_marked_and_checked_at_the_end(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        pytestmark = pytest.mark.penumbra_matrix(n=3, capacity=5)

        @pytest.mark.penumbra_matrix(capacity=1)
        def test_nearest_marker_wins(matrix):
            assert (matrix.n, matrix.capacity) == (3, 1)

        def test_leaves_a_store_open(matrix):
            matrix.producer(0).begin([(0, 0)])
            matrix.words[matrix.layout.bell(0, 1)] += 1
            matrix.consumer(1).event()
            matrix.words[matrix.layout.channel(0, 1)[3]] = 1
    """)
    result = pytester.runpytest_inprocess(*FLAGS)
    assert summary_of(result) == {"passed": 2, "errors": 1}
    result.stdout.fnmatch_lines(["*AssertionError: channel 0: no event will find slots*"])


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    code = (
        f"import sys, pytest, {plugin.PLUGIN}\n"
        "print(sorted({'trio', 'anyio', 'asyncio', 'numpy', 'numba', 'msgspec'} & {*sys.modules}))"
        "; print(sorted(m for m in sys.modules if m.startswith('penumbra.')))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["[]", f"['penumbra.actors', '{plugin.PLUGIN}']"]
