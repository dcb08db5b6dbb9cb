from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from splitserve.logs import ContextLogger, request_logger, setup_logging

logger = logging.getLogger("somewhere")


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def written(json_lines: bool = False) -> io.StringIO:
    stream = io.StringIO()
    setup_logging("prefill", "p0", json=json_lines, stream=stream)
    return stream


def test_json_lines_carry_process_and_fields() -> None:
    stream = written(json_lines=True)
    logger.info("moved %d blocks", 3, extra={"request_id": "r1", "transfer_id": b"\x01\xff", "odd": {1: object}})
    line = json.loads(stream.getvalue())
    assert line["message"] == "moved 3 blocks"
    assert (line["level"], line["logger"], line["role"], line["worker"]) == ("info", "somewhere", "prefill", "p0")
    assert (line["request_id"], line["transfer_id"]) == ("r1", "01ff")
    assert line["ts"].endswith("+00:00")


def test_json_lines_carry_the_traceback() -> None:
    stream = written(json_lines=True)
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("it failed")
    assert "ValueError: broken" in json.loads(stream.getvalue())["exception"]


def test_human_lines_carry_process_and_fields() -> None:
    stream = written()
    logger.warning("moved", extra={"request_id": "r1", "seconds": 0.123456789, "note": "two words"})
    line = stream.getvalue()
    assert " WARNING p0 somewhere: moved  request_id=r1  seconds=0.123457" in line
    assert '  note="two words"' in line


@pytest.mark.parametrize("json_lines", [False, True])
def test_one_record_is_one_line_whatever_a_client_sends(json_lines: bool) -> None:
    stream = written(json_lines)
    logger.info("prompt %s", "a\nERROR p0: forged\x1b[2J", extra={"request_id": "x\nERROR forged"})
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_a_lone_surrogate_is_no_trouble() -> None:
    stream = written(json_lines=True)
    logger.info("odd \ud800", extra={"request_id": "\udfff"})
    assert json.loads(stream.getvalue())["message"].startswith("odd ")


def test_the_level_is_kept_and_unknown_ones_are_refused() -> None:
    stream = written()
    logger.debug("no")
    assert stream.getvalue() == ""
    with pytest.raises(ValueError, match="LOUD"):
        setup_logging("prefill", level="loud")


def test_setting_up_twice_writes_once() -> None:
    written()
    stream = written()
    logger.info("once")
    assert stream.getvalue().count("once") == 1


def test_a_request_logger_adds_its_id_and_a_call_may_add_more() -> None:
    stream = written(json_lines=True)
    request_logger(logger, "r1").bind(worker_id="d0").info("x", extra={"blocks": 4})
    line = json.loads(stream.getvalue())
    assert (line["request_id"], line["worker_id"], line["blocks"]) == ("r1", "d0", 4)


def test_a_single_calls_field_wins() -> None:
    stream = written(json_lines=True)
    ContextLogger(logger, leg="prefill").info("x", extra={"leg": "decode"})
    assert json.loads(stream.getvalue())["leg"] == "decode"
