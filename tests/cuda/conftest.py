"""The pretended device is there for the tests that name it."""

from collections.abc import Iterator

import pytest

from tests.helpers import pretended


@pytest.fixture(autouse=True)
def _pretended(request: pytest.FixtureRequest) -> Iterator[None]:
    names = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    if pretended.NAME not in names:
        yield
        return
    with pretended.present():
        yield
