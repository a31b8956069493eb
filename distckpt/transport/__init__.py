"""Transport: bytes between tensors, wherever they live, and host memory. The one place that knows about devices."""

from distckpt.transport.blocking import BlockingTransport, copy_to_host
from distckpt.transport.devices import Transports, peak_device_bytes
from distckpt.transport.elements import (
    carrier,
    host_bytes,
    host_view,
    is_lazy,
    pieces,
    plain_bytes,
    span_bytes,
    writable_bytes,
)
from distckpt.transport.port import Copies, Event, Registration, Transport
from distckpt.transport.samples import byte_checksums, sample_checksum, sample_checksums

__all__ = [
    "BlockingTransport",
    "Copies",
    "Event",
    "Registration",
    "Transport",
    "Transports",
    "byte_checksums",
    "carrier",
    "copy_to_host",
    "host_bytes",
    "host_view",
    "is_lazy",
    "peak_device_bytes",
    "pieces",
    "plain_bytes",
    "sample_checksum",
    "sample_checksums",
    "span_bytes",
    "writable_bytes",
]
