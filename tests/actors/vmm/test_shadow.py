"""Shadow pages: their books against RAM, and what their changes ask a CPU to flush."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.shadow import FLUSH_ALL, NO_FRAGMENT, ShadowPage, ShadowSpace
from penumbra.hw.formats import IA32, X86_64, A, D, FormatSpec, P, U, W
from penumbra.hw.memory import Ram

LEAF = P | W | U | A | D
RIGHTS = W | U


class Books:
    """A space of its own, and what it reported gone."""

    def __init__(self, spec: FormatSpec, max_pages: int = 64) -> None:
        self.memory = MemoryManagement(Ram(128), 32, identity=False, seed=1)
        self.gone: list[tuple[int, int]] = []
        self.space = ShadowSpace(
            spec, self.memory, max_pages, lambda gfn, index: self.gone.append((gfn, index))
        )

    def root(self, gfn: int) -> ShadowPage:
        """Create a root and load it."""
        self.space.root = page = self.space.create((gfn, self.space._spec.top, NO_FRAGMENT))
        page.va_base = 0
        return page

    def leaf(self, gfn: int, flags: int = LEAF) -> int:
        return self.memory.frame_view[gfn] << 12 | flags


def two_levels() -> tuple[Books, ShadowPage, ShadowPage]:
    """Return an IA-32 root with one table linked at entry 1 that maps guest frame 9 at index 5."""
    books = Books(IA32)
    root = books.root(1)
    table = books.space.create((2, 0, NO_FRAGMENT))
    books.space.link(root, 1, table, RIGHTS, 0x40_5000)
    books.space.set_leaf(table, 5, books.leaf(9), 9)
    return books, root, table


@pytest.mark.shows("V4")
def test_entries_in_ram_are_what_the_hardware_walks() -> None:
    books, root, table = two_levels()
    ram = books.memory.ram
    assert ram.load(root.pfn << 12 | 4, 4) == table.pfn << 12 | RIGHTS | P | A
    assert ram.load(table.pfn << 12 | 20, 4) == books.leaf(9)
    assert books.space.take_flushes() == [], "nothing was there before"
    assert books.space.address(table, 5) == 0x40_5000
    books.space.check()


@pytest.mark.shows("V4", "V6")
def test_a_replaced_leaf_asks_for_one_flush_and_the_same_one_for_none() -> None:
    books, _, table = two_levels()
    books.space.set_leaf(table, 5, books.leaf(9), 9)
    assert books.space.take_flushes() == []
    books.space.set_leaf(table, 5, books.leaf(10), 10)
    assert books.space.take_flushes() == [0x40_5000]
    assert books.gone == [], "the entry is still derived from"
    books.space.check()


@pytest.mark.shows("V6")
def test_revoking_finds_every_mapping_of_a_frame_and_those_that_could_write() -> None:
    books, _, table = two_levels()
    books.space.set_leaf(table, 6, books.leaf(9, LEAF & ~W), 9)
    books.space.set_leaf(table, 7, books.leaf(9), 9)
    books.space.set_leaf(table, 8, books.leaf(10), 10)
    assert books.space.revoke_write(9) == 2
    assert books.space.take_flushes() == [0x40_5000, 0x40_7000]
    assert [bool(books.space.entry(table, i) & W) for i in (5, 6, 7, 8)] == [False] * 3 + [True]
    assert (books.space.revoke_write(9), books.space.revoke_write(11)) == (0, 0)
    books.space.check()


@pytest.mark.shows("V6")
def test_clearing_the_last_entry_that_derives_from_a_guest_entry_says_so() -> None:
    books, root, table = two_levels()
    again = books.space.create((2, 1, NO_FRAGMENT))  # the same guest table in another role
    below = books.space.create((3, 0, NO_FRAGMENT))
    books.space.link(again, 5, below, RIGHTS, 0)
    books.space.clear(table, 5)
    assert books.gone == []
    books.space.clear(again, 5)
    assert books.gone == [(2, 5)]
    books.space.clear(again, 5)
    books.space.clear(root, 1)
    assert books.gone == [(2, 5), (1, 1)]
    books.space.check()


@pytest.mark.shows("V4")
def test_dropping_a_page_unlinks_it_everywhere_and_frees_its_frame() -> None:
    books, root, table = two_levels()
    books.space.link(root, 3, table, U, 0xC0_0000)
    assert books.space.address(table, 5) == FLUSH_ALL, "it translates at two places now"
    books.space.drop(table)
    assert books.space.take_flushes() == [FLUSH_ALL]
    assert sorted(books.gone) == [(1, 1), (1, 3), (2, 5)]
    assert (books.space.find((2, 0, NO_FRAGMENT)), books.space.of_table(2)) == (None, [])
    assert [books.space.entry(root, index) for index in (1, 3)] == [0, 0]
    assert books.memory.take_frame() == table.pfn
    books.space.check()


@pytest.mark.shows("V4")
def test_other_rights_of_a_link_are_a_change_and_the_same_are_none() -> None:
    books, root, table = two_levels()
    books.space.link(root, 1, table, RIGHTS, 0x40_0000)
    assert books.space.take_flushes() == []
    books.space.link(root, 1, table, U, 0x40_0000)
    assert books.space.take_flushes() == [FLUSH_ALL]
    assert books.space.entry(root, 1) & (W | U) == U
    books.space.check()


@pytest.mark.shows("G7")
def test_a_fragment_goes_when_its_large_page_is_unlinked() -> None:
    books = Books(IA32)
    root = books.root(1)
    piece = books.space.create((1, 0, 2 << 20))
    books.space.link(root, 2, piece, RIGHTS, 0x80_0000)
    books.space.set_leaf(piece, 5, books.leaf(9), 9)
    books.space.link(root, 2, piece, U, 0x80_0000)
    assert books.space.n_pages == 2, "other rights leave it where it is"
    books.space.clear(root, 2)
    assert (books.space.n_pages, books.gone) == (1, [(1, 2)])
    books.space.check()


@pytest.mark.shows("V4")
def test_short_of_memory_the_least_recently_used_page_goes_but_never_the_root() -> None:
    books = Books(IA32, max_pages=8)
    books.root(1)
    tables = [books.space.create((gfn, 0, NO_FRAGMENT)) for gfn in range(2, 9)]
    assert books.space.n_pages == 8
    books.space.find(tables[0].role)
    books.space.create((20, 0, NO_FRAGMENT))
    assert books.space.find(tables[0].role) is tables[0]
    assert books.space.find(tables[1].role) is None
    assert books.space.find((1, 1, NO_FRAGMENT)) is books.space.root
    assert books.space.n_pages == 8
    assert books.space.take_flushes() == [FLUSH_ALL]
    books.space.check()


indexes = st.integers(0, 1)
frames = st.integers(8, 10)
# A guest table per level; 4 and 5 serve at two levels.
tables = st.tuples(st.sampled_from([2, 4]), st.sampled_from([3, 4, 5]), st.sampled_from([5, 6, 7]))


class ShadowAndTlb(RuleBasedStateMachine):
    """A space under any sequence of changes, with a TLB that caches all it can see.

    The TLB is flushed where the space says so. What must hold: it maps no frame writable that no
    shadow entry maps writable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(X86_64, max_pages=10)
        self.space = self.books.space
        self.books.root(1)
        self.tlb: dict[int, int] = {}

    def pick(self, number: int) -> ShadowPage:
        pages = self.space.all_pages()
        return pages[number % len(pages)]

    def flush(self) -> None:
        for gva in self.space.take_flushes():
            if gva == FLUSH_ALL:
                self.tlb.clear()
            else:
                self.tlb.pop(gva, None)

    @rule(below=tables, path=st.tuples(*[indexes] * 4), gfn=frames, flags=st.sampled_from([0, W]))
    def fill(
        self, below: tuple[int, int, int], path: tuple[int, int, int, int], gfn: int, flags: int
    ) -> None:
        gva = sum(i << X86_64.levels[3 - n].shift for n, i in enumerate(path))
        page = self.space.root
        assert page is not None
        for level, table in zip((2, 1, 0), below, strict=True):
            role = (table, level, NO_FRAGMENT)
            child = self.space.find(role) or self.space.create(role)
            self.space.link(page, path[2 - level], child, RIGHTS, gva)
            page = child
        self.space.set_leaf(page, path[3], self.books.leaf(gfn, LEAF & ~W | flags), gfn)
        self.flush()

    @rule()
    def cache(self) -> None:
        """Use every address: the TLB takes what the tables say."""
        for path in product((0, 1), repeat=4):
            page = self.space.root
            for index in path[:3]:
                page = page and page.children.get(index)
            if page and path[3] in page.live and self.space.entry(page, path[3]) & W:
                gva = sum(i << X86_64.levels[3 - n].shift for n, i in enumerate(path))
                self.tlb[gva] = page.live[path[3]]

    @rule(number=st.integers(0, 20), index=indexes)
    def clear(self, number: int, index: int) -> None:
        self.space.clear(self.pick(number), index)
        self.flush()

    @rule(number=st.integers(0, 20))
    def drop(self, number: int) -> None:
        page = self.pick(number)
        if page is not self.space.root:
            self.space.drop(page)
        self.flush()

    @rule(gfn=frames)
    def revoke(self, gfn: int) -> None:
        self.space.revoke_write(gfn)
        self.flush()

    @invariant()
    def books_are_right_and_no_writable_copy_outlives_its_entry(self) -> None:
        self.space.check()
        self.books.memory.check()
        writable = {g for page, i, g in self.space.leaves() if self.space.entry(page, i) & W}
        assert set(self.tlb.values()) <= writable


test_flushes = ShadowAndTlb.TestCase
test_flushes.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_flushes = pytest.mark.shows("V4", "V6")(test_flushes)
