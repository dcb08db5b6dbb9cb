"""Which transports this process can use. Nothing is chosen silently: the choice is one line in the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Transport
from kvtransfer.ucx import UcxTransport
from kvtransfer.ucx_driver import load_ucxx
from splitserve.errors import ConfigError

logger = logging.getLogger(__name__)

NAMES = ("ucx", "tcp")  # in order of preference


def available_transports() -> tuple[str, ...]:
    """Names of the transports between processes that work here, best first."""
    try:
        load_ucxx()
    except ConfigError as error:
        logger.warning("KV blocks go over tcp: %s", error)
        return ("tcp",)
    return NAMES


def make_transports(names: Sequence[str]) -> list[Transport]:
    """The named ones, in that order. ConfigError for an unknown name, or ucx where ucxx is missing."""
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ConfigError(f"unknown transport {', '.join(unknown) or '(none)'}: there are {', '.join(NAMES)}")
    makers: dict[str, type[UcxTransport | TcpTransport]] = {"ucx": UcxTransport, "tcp": TcpTransport}
    return [makers[name]() for name in names]


def default_transports() -> list[Transport]:
    """Everything that works here, best first."""
    names = available_transports()
    logger.info("KV blocks travel over %s", ", else ".join(names))
    return make_transports(names)
