"""Everything asynchronous here runs on both event loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Name the event loop of tests marked `anyio`."""
    backend = request.param
    assert isinstance(backend, str)
    return backend


@pytest.fixture
def ends_with() -> Callable[..., AbstractContextManager[None]]:
    """Return a context manager that expects a group of exactly these exceptions, or no error."""
    return _ends_with


@contextmanager
def _ends_with(*names: str) -> Iterator[None]:
    found: list[str] = []
    try:
        yield
    except ExceptionGroup as group:
        found = _names(group)
    assert found == sorted(names)


def _names(error: BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        return sorted(name for inner in error.exceptions for name in _names(inner))
    return [type(error).__name__]
