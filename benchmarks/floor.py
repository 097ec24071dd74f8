"""The least time that a training step can take, from what it has to do and what the machine can do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What a machine was measured to do.

    Attributes:
        h2d, d2h: bytes/s from pinned host memory to the device and back, one direction at a time.
        duplex: bytes/s of both directions together, both at a time.
        device_copy: bytes/s of a copy within the device, each read and each write counted.
        matmul: floating-point operations/s of a bf16 matrix product.
        host_copy: bytes/s of a copy within host memory, each read and each write counted.
        host_update: parameters/s of the package's own AdamW on the host: bf16 gradients, split masters, fp32 states.
        threads: that the host computed with.
    """

    h2d: float
    d2h: float
    duplex: float
    device_copy: float
    matmul: float
    host_copy: float
    host_update: float
    threads: int


@dataclass(frozen=True)
class Work:
    """What one optimizer step has to do, by its plan.

    Attributes:
        flops: floating-point operations of all forwards and backwards.
        fetched, offloaded: bytes from the host to the device and back.
        hosted: parameters whose update is on the host.
    """

    flops: float
    fetched: int
    offloaded: int
    hosted: int


@dataclass(frozen=True)
class Floor:
    """Seconds of each part of a step, were it alone.

    Attributes:
        compute: the matrix products.
        pcie: the copies between host and device: the slower direction, or both where they share what they have.
        update: the optimizer's update on the host.
    """

    compute: float
    pcie: float
    update: float

    @property
    def seconds(self) -> float:
        """The least time of a step in which all of them go on at once."""
        return max(self.compute, self.pcie, self.update)

    @property
    def bound(self) -> str:
        """The part that the step cannot be faster than."""
        parts = {"compute": self.compute, "PCIe": self.pcie, "host update": self.update}
        return max(parts, key=lambda name: parts[name])


def floor_of(work: Work, rates: Rates) -> Floor:
    """The floor ``max(compute, PCIe bytes / PCIe speed, host update)`` by its parts."""
    return Floor(
        compute=work.flops / rates.matmul,
        pcie=max(work.fetched / rates.h2d, work.offloaded / rates.d2h, (work.fetched + work.offloaded) / rates.duplex),
        update=work.hosted / rates.host_update,
    )
