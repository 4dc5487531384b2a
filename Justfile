# Public recipes carry a one-line comment; arguments after the name go to the program behind it.

set positional-arguments

just := quote(just_executable())
python := ".venv/bin/python -P"
penumbra := ".venv/bin/penumbra"
few := "--schemes native,shootdown,patch --quiet"

# List the recipes.
default:
    @{{ just }} --list --unsorted

# Compare native execution, shadow page tables by shootdown, and patch channels, checked by the oracle.
demo *args: setup-demo
    @{{ penumbra }} compare pipeline --schemes native,shootdown,patch "$@"

# Run the tests on all cores; arguments go to pytest (`-n 0`: in one process).
test *args: setup-dev
    {{ python }} -m pytest -n auto --dist worksteal "$@"

# Check style and formatting with ruff.
lint: setup-dev
    {{ python }} -m ruff check
    {{ python }} -m ruff format --check

# Write docs/conformance.md from the tests' markers; `--check` refuses a stale file and empty rows.
conformance *args: setup-dev
    {{ python }} scripts/conformance.py "$@"

# Check types with mypy (strict) and pyright.
types: setup-dev link
    {{ python }} -m mypy
    {{ python }} -m pyright --pythonpath .venv/bin/python

# Run one workload under several schemes and print the table side by side.
compare *args: setup-demo
    @{{ penumbra }} compare "$@"

# Run one workload under one scheme.
run *args: setup-demo
    @{{ penumbra }} run "$@"

# List workloads, schemes, cost profiles and fault switches.
list *args: setup-demo
    @{{ penumbra }} list "$@"

# Print published ratios beside the model's predictions, with the commands that make them.
paper *args: setup-demo
    @{{ penumbra }} paper "$@"

# Say what a recording holds and how much guest memory it needs.
trace-info *args: setup-demo
    @{{ penumbra }} trace info "$@"

# Record a command under valgrind as a .trace file: `just record -o FILE -- CMD ...`.
record *args: setup-demo
    @{{ penumbra }} trace record "$@"

# Run random machines, schemes and workloads for so many minutes; what fails prints its own replay.
soak *args: setup-dev
    {{ python }} scripts/soak.py "$@"

# Compare schemes on processes that fork and copy on write.
fork-storm *args: setup-demo
    @{{ penumbra }} compare examples/fork_storm.toml "$@"

# Compare schemes on a process that maps and unmaps memory without rest.
mmap-churn *args: setup-demo
    @{{ penumbra }} compare examples/mmap_churn.toml "$@"

# Compare schemes on threads whose guest OS shoots down each other's TLBs.
shootdown-stress *args: setup-demo
    @{{ penumbra }} compare examples/shootdown_stress.toml "$@"

# Compare schemes on many processes with many page tables, switched all the time.
process-switcher *args: setup-demo
    @{{ penumbra }} compare examples/process_switcher.toml "$@"

# Compare schemes on processes that share a pool of buffers and write them back.
buffer-pool *args: setup-demo
    @{{ penumbra }} compare examples/buffer_pool.toml "$@"

# Compare schemes on processes that use several times the memory there is, paged to a virtual disk.
swap-thrash *args: setup-demo
    @{{ penumbra }} compare examples/swap_thrash.toml "$@"

# Compare schemes on threads whose large pages are made and split while they write to them.
page-splitting *args: setup-demo
    @{{ penumbra }} compare examples/page_splitting.toml "$@"

# Compare the schemes of a file of one's own with the listed ones, on a small tree of processes.
own-schemes *args: setup-demo
    @{{ penumbra }} compare fork-storm --set workload.pages=6 --set workload.depth=1 \
        --scheme-file examples/own_schemes.toml "$@"

# Compare schemes on a process that forks and waits, over and over.
fork-wait *args: setup-demo
    @{{ penumbra }} compare examples/fork_wait.toml "$@"

# Compare schemes on a process that only touches new pages.
page-fault *args: setup-demo
    @{{ penumbra }} compare examples/page_fault.toml "$@"

# Compare schemes on a process whose page-table entries keep changing.
pte-change *args: setup-demo
    @{{ penumbra }} compare examples/pte_change.toml "$@"

# Compare schemes on a process that calls its kernel for nothing.
system-calls *args: setup-demo
    @{{ penumbra }} compare examples/system_calls.toml "$@"

# Compare schemes on short processes that read, fill a heap and compute, as in a build.
compile-mix *args: setup-demo
    @{{ penumbra }} compare examples/compile_mix.toml "$@"

# Compare schemes on a thread that maps and unmaps among busy siblings.
munmap-storm *args: setup-demo
    @{{ penumbra }} compare examples/munmap_storm.toml "$@"

# Compare schemes on threads that map a file for each request.
mmap-server *args: setup-demo
    @{{ penumbra }} compare examples/mmap_server.toml "$@"

# Compare schemes on a recorded program, a shell pipeline of eleven processes.
recorded *args: setup-demo
    @{{ penumbra }} compare examples/recorded.toml "$@"

# Run every example, each compared under three schemes.
examples: setup-demo embed-examples
    @{{ penumbra }} compare examples/buffer_pool.toml {{ few }}
    @{{ penumbra }} compare examples/compile_mix.toml {{ few }}
    @{{ penumbra }} compare examples/fork_storm.toml {{ few }}
    @{{ penumbra }} compare examples/fork_wait.toml {{ few }}
    @{{ penumbra }} compare examples/mmap_churn.toml {{ few }}
    @{{ penumbra }} compare examples/mmap_server.toml {{ few }}
    @{{ penumbra }} compare examples/munmap_storm.toml {{ few }}
    @{{ penumbra }} compare fork-storm {{ few }} --set workload.depth=1 --scheme-file examples/own_schemes.toml
    @{{ penumbra }} compare examples/page_fault.toml {{ few }}
    @{{ penumbra }} compare examples/page_splitting.toml {{ few }}
    @{{ penumbra }} compare examples/process_switcher.toml {{ few }}
    @{{ penumbra }} compare examples/pte_change.toml {{ few }}
    @{{ penumbra }} compare examples/recorded.toml {{ few }}
    @{{ penumbra }} compare examples/shootdown_stress.toml {{ few }}
    @{{ penumbra }} compare examples/swap_thrash.toml {{ few }}
    @{{ penumbra }} compare examples/system_calls.toml {{ few }}

# Run the examples of derived data and a machine inside a Starlette (asyncio) and a trio application.
embed-examples: setup-dev
    {{ python }} examples/embed_starlette.py
    {{ python }} examples/embed_trio.py

# Run TLB litmus tests under every scheme, in every order; the shipped sample unless a file is given.
litmus *args="tests/data/litmus_sample.json": setup-demo
    @{{ penumbra }} litmus "$@"

# Measure what things cost, each row a ratio within one run: `just bench [ROW-GLOB] [--pairs N] [--json]`.
bench *args: setup-dev
    {{ python }} benchmarks "$@"

# The same, and write it to a file under benchmarks/results/ named by commit and date.
bench-record *args: setup-dev
    {{ python }} benchmarks --record benchmarks/results "$@"

# Print the JSON schema of the configuration file.
schema *args: setup-demo
    @{{ penumbra }} schema "$@"

# List the figures, claims and paragraphs of the texts with the file:line that implements each.
figures *args: setup-demo
    {{ python }} scripts/figures.py "$@"

# Write the hashed locks again; `just lock --upgrade` takes newer versions.
lock *args:
    scripts/lock "$@"

# Check that the locks hold no URL and are what pyproject.toml asks for.
lock-check:
    scripts/lock --check

# Make the three links under build/ns through which mypy and pyright see the packages.
link:
    @mkdir -p build/ns/penumbra
    @for room in actors guest hw; do ln -sfn "../../../$room" "build/ns/penumbra/$room"; done

# Remove what can be made again: environment, builds, caches. Recorded runs stay.
clean:
    rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
    find actors guest hw tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

[private]
setup-dev:
    @scripts/setup requirements-dev.lock

# The kernels are compiled once per change of hw/ or of the lock, not inside the first run.
[private]
setup-demo:
    @scripts/setup requirements.lock
    @test -z "$(find hw requirements.lock -type f ! -path '*/__pycache__/*' -newer .venv/.stamp-kernels 2>&1)" \
        || { {{ python }} -m penumbra.hw.compiled && touch .venv/.stamp-kernels; }
