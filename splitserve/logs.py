"""Structured logs: what was said, by which process, about which request.

Owns the format; knows no logger by name. Everything passed as ``extra=`` becomes a field.
Invariant: one record is one line, whatever a client put into it.
"""

from __future__ import annotations

import json as json_strings
import logging
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}
_QUIET = (
    "httpx",
    "httpcore",
    "uvicorn.access",
    "uvicorn.error",
)  # one line a request is ours to write, not theirs


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, logger, message, role, worker and the record's own fields."""

    def __init__(self, role: str, worker_id: str) -> None:
        super().__init__()
        self._process = {"role": role, "worker": worker_id}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # half of a surrogate pair, an integer beyond 64 bits: valid for Python, not for orjson
            return json_strings.dumps(line, default=_plain)


class HumanFormatter(logging.Formatter):
    """``12:00:00.123 INFO    prefill-0 kvtransfer.server: message  request_id=r1``."""

    def __init__(self, role: str, worker_id: str) -> None:
        super().__init__()
        self._process = worker_id or role

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        fields = "".join(f"  {name}={_word(value)}" for name, value in _fields(record).items())
        message = _one_line(record.getMessage())
        line = f"{time} {record.levelname:<7} {self._process} {record.name}: {message}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class ContextLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger that adds ``fields`` to every record; fields of a single call win."""

    def __init__(self, logger: logging.Logger, **fields: Any) -> None:
        super().__init__(logger, fields)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs

    def bind(self, **fields: Any) -> ContextLogger:
        """The same logger with more fields."""
        return ContextLogger(self.logger, **{**(self.extra or {}), **fields})


def request_logger(logger: logging.Logger, request_id: str) -> ContextLogger:
    """A logger whose every record carries the request's id."""
    return ContextLogger(logger, request_id=request_id)


def setup_logging(
    role: str,
    worker_id: str = "",
    level: str = "info",
    json: bool = False,
    stream: TextIO | None = None,
) -> None:
    """Sends the records of all loggers to ``stream`` (default: stderr), replacing what was set up before.

    Raises ValueError for a level that is none.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter((JsonFormatter if json else HumanFormatter)(role, worker_id))
    root = logging.getLogger()
    root.setLevel(level.upper())
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


def _plain(value: Any) -> str:
    return bytes(value).hex() if isinstance(value, bytes | bytearray | memoryview) else str(value)


def _word(value: Any) -> str:
    """``value`` as one word; quoted if it is more than that."""
    text = f"{value:.6g}" if isinstance(value, float) else _plain(value)
    return text if text.isprintable() and " " not in text and text else json_strings.dumps(text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
