"""Transport: bytes between tensors, wherever they live, and host memory. The one place that knows about devices."""

from distckpt.transport.blocking import BlockingTransport, copy_to_host
from distckpt.transport.devices import Transports
from distckpt.transport.elements import carrier, host_bytes, is_lazy, pieces
from distckpt.transport.port import Copies, Event, Registration, Transport
from distckpt.transport.samples import sample_checksum, sample_checksums

__all__ = [
    "BlockingTransport",
    "Copies",
    "Event",
    "Registration",
    "Transport",
    "Transports",
    "carrier",
    "copy_to_host",
    "host_bytes",
    "is_lazy",
    "pieces",
    "sample_checksum",
    "sample_checksums",
]
