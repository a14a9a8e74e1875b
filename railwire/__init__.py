"""Railwire: point-to-point transfers for LLM systems, over whatever NIC there is.

Start with :class:`TransferEngine`. The guarantees are in docs/guarantees.md.
"""

from railwire import libraries as _libraries
from railwire.counter import Counter
from railwire.engine import TransferEngine
from railwire.errors import (
    AuthenticationError,
    ClosedError,
    ConfigurationError,
    ConnectError,
    ConnectTimeout,
    DescriptorError,
    ExpectationCancelled,
    ExpectationError,
    ExpectationTimeout,
    FenceError,
    LinkError,
    PeerLostError,
    RailwireError,
    RemoteAccessError,
    RevokedError,
    StaleAddressError,
    TransferCancelled,
    TransferError,
    WriterFailed,
    WriterLost,
)
from railwire.group import PeerGroup
from railwire.memory import MemoryRegion, Pages, RegionSlice, RemoteRegion, ScatterTarget
from railwire.nics import NicInfo
from railwire.peer import EngineAddress, Peer
from railwire.prepared import Prepared, Trigger
from railwire.regions import Regions, RemoteRegions
from railwire.transfer import Expectation, Fence, Future, Transfer
from railwire.watcher import Watcher

_libraries.configure()

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "ClosedError",
    "ConfigurationError",
    "ConnectError",
    "ConnectTimeout",
    "Counter",
    "DescriptorError",
    "EngineAddress",
    "Expectation",
    "ExpectationCancelled",
    "ExpectationError",
    "ExpectationTimeout",
    "Fence",
    "FenceError",
    "Future",
    "LinkError",
    "MemoryRegion",
    "NicInfo",
    "Pages",
    "Peer",
    "PeerGroup",
    "PeerLostError",
    "Prepared",
    "RailwireError",
    "RegionSlice",
    "Regions",
    "RemoteAccessError",
    "RemoteRegion",
    "RemoteRegions",
    "RevokedError",
    "ScatterTarget",
    "StaleAddressError",
    "Transfer",
    "TransferCancelled",
    "TransferEngine",
    "TransferError",
    "Trigger",
    "Watcher",
    "WriterFailed",
    "WriterLost",
]
