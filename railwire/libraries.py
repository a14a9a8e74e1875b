"""Where libfabric may be, best first: one wheel works everywhere because nothing is linked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from railwire import _native

ENVIRONMENT_VARIABLE = "RAILWIRE_LIBFABRIC"


def libfabric_candidates() -> list[str]:
    """Paths in the order in which they are tried.

    1. ``RAILWIRE_LIBFABRIC``, if set: then nothing else is tried.
    2. The EFA installer's, which alone knows the newest EFA devices.
    3. The one inside the ``mpich`` wheel of this environment (2.x, faster than most distributions' own).
    4. The system's.
    """
    explicit = os.environ.get(ENVIRONMENT_VARIABLE)
    if explicit:
        return [explicit]
    wheel = Path(sys.prefix) / "lib" / "mpich" / "libfabric.so.1"
    return [
        "/opt/amazon/efa/lib64/libfabric.so.1",
        "/opt/amazon/efa/lib/libfabric.so.1",
        str(wheel),
        "libfabric.so.1",
    ]


def configure() -> None:
    """Tells the native core; called once, at import."""
    _native.set_libfabric_search(libfabric_candidates())
