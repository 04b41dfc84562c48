"""One running product per test module; modules that stop and kill servers make their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.product import Product, product


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with product(tmp_path_factory.mktemp("up")) as it:
        yield it


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Product]:
    """A product of the test's own, for tests that stop or kill it."""
    with product(tmp_path / "home") as it:
        yield it
