"""Fixtures of the device tests."""

from __future__ import annotations

import pytest
from device_wire import Wire


@pytest.fixture
def wire() -> Wire:
    """A fresh line, low."""
    return Wire()
