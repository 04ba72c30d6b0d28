"""The worked examples in the ledger's docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["money", "ids", "accounts", "templates", "lease_book", "refunds", "usage"])
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"marketplace.ledger.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
