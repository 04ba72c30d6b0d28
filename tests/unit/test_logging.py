"""Log lines are JSON objects with fields, whoever wrote them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from marketplace.platform.logging import configure_logging


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_a_line_says_which_process_request_and_node(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("gateway")
    fields = {"request_id": "0190", "node": "n1"}
    logging.getLogger("a").warning("a node failed a request: %s", "Silent", extra=fields)
    structlog.get_logger("b").info("serving", port=80)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first["event"] == "a node failed a request: Silent"
    assert (first["request_id"], first["node"]) == ("0190", "n1")
    assert (first["process"], first["level"], second["port"]) == ("gateway", "warning", 80)
