"""Moving KV blocks between the pools of two workers: a puller fetches what a source publishes.

Knows block indices, bytes and leases; no requests, no scheduler, no gRPC, no tensors.
Invariant: blocks are reused on either side only when no byte of them can be read or written any more.
"""

from kvtransfer.blocks import BlockMemory
from kvtransfer.client import PullClient, PullResult
from kvtransfer.device_blocks import DeviceBlocks
from kvtransfer.faults import Reason
from kvtransfer.handle import KvHandle
from kvtransfer.memory import MemoryTransport
from kvtransfer.observer import NullObserver, TransferObserver
from kvtransfer.publication import Publication, ReleaseReason
from kvtransfer.selection import available_transports, default_transports, make_transports
from kvtransfer.server import BlockServer
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Connection, Listener, Transport
from kvtransfer.ucx import UcxTransport
from kvtransfer.ucx_loopback import prefer_loopback

__all__ = [
    "BlockMemory",
    "BlockServer",
    "Connection",
    "DeviceBlocks",
    "KvHandle",
    "Listener",
    "MemoryTransport",
    "NullObserver",
    "Publication",
    "PullClient",
    "PullResult",
    "Reason",
    "ReleaseReason",
    "TcpTransport",
    "TransferObserver",
    "Transport",
    "UcxTransport",
    "available_transports",
    "default_transports",
    "make_transports",
    "prefer_loopback",
]
