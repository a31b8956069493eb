"""Transports: which transport moves which tensor. One object for tensors of any devices, mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distckpt._C import Memory
from distckpt.transport.blocking import BlockingTransport
from distckpt.transport.cuda import CudaTransport
from distckpt.transport.port import AllOf, Copies, Event, Registration, Transport


class Transports:
    """The transport of each kind of device, made when it is first asked for. One thread at a time."""

    def __init__(self) -> None:
        self._by_type: dict[str, Transport] = {"cpu": BlockingTransport(is_host=True)}

    def of(self, tensor: Tensor) -> Transport:
        kind = tensor.device.type
        if kind not in self._by_type:
            self._by_type[kind] = CudaTransport() if kind == "cuda" else BlockingTransport(is_host=False)
        return self._by_type[kind]

    def register(self, memory: Memory, tensors: Sequence[Tensor]) -> Registration:
        """Page-lock memory for copies of these tensors, as far as their devices ask for it and grant it."""
        devices = {self.of(tensor): tensor.device for tensor in tensors}
        return _Registrations([transport.register(memory, device) for transport, device in devices.items()])

    def copy_to_host(self, copies: Copies) -> Event:
        """As Transport.copy_to_host, for any devices."""
        groups = self._grouped(copies, lambda pair: pair[0])
        return AllOf([transport.copy_to_host(own) for transport, own in groups.items()])

    def copy_from_host(self, copies: Copies) -> Event:
        """As Transport.copy_from_host, for any devices."""
        groups = self._grouped(copies, lambda pair: pair[1])
        return AllOf([transport.copy_from_host(own) for transport, own in groups.items()])

    def _grouped(
        self, copies: Copies, on_device: Callable[[tuple[Tensor, Tensor]], Tensor]
    ) -> dict[Transport, list[tuple[Tensor, Tensor]]]:
        groups: dict[Transport, list[tuple[Tensor, Tensor]]] = {}
        for pair in copies:
            groups.setdefault(self.of(on_device(pair)), []).append(pair)
        return groups


def peak_device_bytes() -> int:
    """The most that this process has had allocated at any one time on its current accelerator; 0 without one.

    0 too where torch does not count it for this kind of accelerator. Does not start one up.
    """
    try:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return 0
        device = torch.get_device_module(accelerator)
        if not getattr(device, "is_initialized", lambda: True)():
            return 0
        return int(device.max_memory_allocated())
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # Backends differ in what they have.
        return 0


class _Registrations:
    """Those of one memory with several transports. size_bytes is what all of them have page-locked."""

    def __init__(self, registrations: Sequence[Registration]) -> None:
        self._registrations = registrations

    @property
    def size_bytes(self) -> int:
        return min((r.size_bytes for r in self._registrations), default=0)

    @property
    def refusal(self) -> str | None:
        return "; ".join(r.refusal for r in self._registrations if r.refusal is not None) or None

    def release(self) -> None:
        for registration in self._registrations:
            registration.release()
