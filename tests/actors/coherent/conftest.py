"""Everything asynchronous here runs on both event loops."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["trio", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Name the event loop of tests marked `anyio`."""
    backend = request.param
    assert isinstance(backend, str)
    return backend
