"""AreaMap against a dictionary of single pages."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penumbra.guest.kernel.areas import ANONYMOUS, Area, AreaMap, page_word

PAGES = 24
page_ranges = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 8)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1], PAGES))
)
Page = tuple[int, bool, int, int]


def pages_of(areas: list[Area]) -> dict[int, Page]:
    return {
        vpn: (
            area.prot,
            area.shared,
            area.file_id,
            0 if area.file_id == ANONYMOUS else area.object_page(vpn),
        )
        for area in areas
        for vpn in range(area.first, area.stop)
    }


class Areas(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.areas = AreaMap()
        self.model: dict[int, Page] = {}

    @rule(
        pages=page_ranges,
        prot=st.sampled_from([0, 1, 3]),
        file_id=st.sampled_from([ANONYMOUS, 5]),
        offset=st.integers(0, 3),
    )
    def map_over(self, pages: tuple[int, int], prot: int, file_id: int, offset: int) -> None:
        self.remove(pages)
        area = Area(*pages, prot, False, file_id, offset)
        self.areas.insert(area)
        self.model |= pages_of([area])

    @rule(pages=page_ranges)
    def remove(self, pages: tuple[int, int]) -> None:
        taken = self.areas.remove(*pages)
        expected = {vpn: self.model.pop(vpn) for vpn in range(*pages) if vpn in self.model}
        assert pages_of(taken) == expected

    @rule(pages=page_ranges)
    def look(self, pages: tuple[int, int]) -> None:
        expected = {vpn: page for vpn, page in self.model.items() if pages[0] <= vpn < pages[1]}
        assert pages_of(self.areas.overlapping(*pages)) == expected

    @rule(n=st.integers(1, 6), base=st.integers(0, 10), hole=page_ranges)
    def find_gap(self, n: int, base: int, hole: tuple[int, int]) -> None:
        taken = set(self.model) | set(range(*hole))
        fitting = (
            at for at in range(base, PAGES - n + 1) if not taken.intersection(range(at, at + n))
        )
        assert self.areas.gap(n, base, PAGES, hole) == next(fitting, None)

    @invariant()
    def same_pages(self) -> None:
        self.areas.check()
        assert pages_of(list(self.areas)) == self.model
        for vpn in range(PAGES):
            area = self.areas.find(vpn)
            assert (area is not None) == (vpn in self.model)


TestAreas = Areas.TestCase


def test_contents_differ_by_file_and_page_and_are_zero_for_memory() -> None:
    words = {page_word(file_id, page) for file_id in range(-5, 20) for page in range(50)}
    # ANONYMOUS, which is -1, gives the one zero.
    assert (len(words), 0 in words) == (24 * 50 + 1, True)
