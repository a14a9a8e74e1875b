"""What moves and converts token rows, behind one interface: ``torch`` (the reference, and the product on CPUs) and
``triton`` (GPUs). Both give the same bits."""

from __future__ import annotations

from railwire.errors import ConfigurationError
from railwire.moe.geometry import Geometry
from railwire.moe.kernels.backend import KernelBackend, Routing

__all__ = ["KernelBackend", "Routing", "make_backend"]


def make_backend(name: str, geometry: Geometry, device: str) -> KernelBackend:
    """Raises ConfigurationError for a name there is not, or a package that is missing."""
    try:
        if name == "torch":
            from railwire.moe.kernels.torch_backend import TorchBackend

            backend: KernelBackend = TorchBackend(geometry, device)
            return backend
        if name == "triton":
            from railwire.moe.kernels.triton_backend import TritonBackend

            compiled: KernelBackend = TritonBackend(geometry, device)
            return compiled
    except ImportError as error:
        raise ConfigurationError(f"kernels {name!r}: {error}: pip install 'railwire[moe]'") from error
    raise ConfigurationError(f"kernels are torch or triton, not {name!r}")
