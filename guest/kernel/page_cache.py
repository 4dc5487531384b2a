"""Pages of files and of shared anonymous objects, held in frames that processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from penumbra.guest.kernel.areas import SHARED_OBJECTS, Area
from penumbra.guest.kernel.frames import Frames


class PageCache:
    """Frames by (object, page); the cache holds one reference to each.

    There is no disk behind it: a page somebody may have written through a shared mapping cannot be
    made again and stays as long as anything can reach it.

    Invariant: every frame in it is taken.
    """

    def __init__(self, frames: Frames, reachable_areas: Callable[[], Iterable[Area]]) -> None:
        self._frames = frames
        self._pages: dict[tuple[int, int], int] = {}
        self._written: set[tuple[int, int]] = set()
        self._reachable_areas = reachable_areas
        self._n_objects = 0

    def __len__(self) -> int:
        return len(self._pages)

    def new_object(self) -> int:
        """Return the id of a new shared anonymous object."""
        self._n_objects += 1
        return SHARED_OBJECTS + self._n_objects - 1

    def get(self, file_id: int, page: int) -> int | None:
        """Return the page's frame with a reference for the caller, if it is held."""
        gfn = self._pages.get((file_id, page))
        if gfn is not None:
            self._frames.share(gfn)
        return gfn

    def offer(self, file_id: int, page: int, gfn: int) -> int:
        """Let a filled frame be the page; the caller's reference moves to the one returned.

        Another CPU may have been first: then its frame is returned and `gfn` is free again.
        """
        present = self.get(file_id, page)
        if present is not None:
            self._frames.drop(gfn)
            return present
        self._pages[file_id, page] = gfn
        self._frames.share(gfn)
        return gfn

    def written(self, file_id: int, page: int) -> None:
        """Note that the page is mapped for writing."""
        self._written.add((file_id, page))

    def is_clean(self, file_id: int, page: int, gfn: int) -> bool:
        """Tell whether the page is in this frame and can be made again without it."""
        remade = file_id < SHARED_OBJECTS and (file_id, page) not in self._written
        return remade and self.holds(file_id, page, gfn)

    def holds(self, file_id: int, page: int, gfn: int) -> bool:
        """Tell whether the page is in this frame."""
        return self._pages.get((file_id, page)) == gfn

    def forget_object(self, file_id: int) -> None:
        """Drop a shared anonymous object that no area names any more."""
        if file_id < SHARED_OBJECTS:
            return
        if any(area.file_id == file_id for area in self._reachable_areas()):
            return
        for key in [key for key in self._pages if key[0] == file_id]:
            self._drop(key)

    def reclaim(self) -> bool:
        """Free every clean page that nobody maps; tell whether one was freed."""
        idle = [
            key
            for key, gfn in self._pages.items()
            if key[0] < SHARED_OBJECTS
            and key not in self._written
            and self._frames.references(gfn) == 1
        ]
        for key in idle:
            self._drop(key)
        return bool(idle)

    def _drop(self, key: tuple[int, int]) -> None:
        self._written.discard(key)
        self._frames.drop(self._pages.pop(key))

    def check(self) -> None:
        for gfn in self._pages.values():
            assert self._frames.references(gfn) >= 1
