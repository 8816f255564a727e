"""Budgets of training: FLOPs, and what they are in days and dollars on a machine."""

from typing import NamedTuple

DAY = 86_400


class Machine(NamedTuple):
    """Devices to train on.

    Attributes:
        name: the topology as the user wrote it.
        speed: model FLOPs a second of all devices, as they are reached.
        mfu: that speed as a share of their peak.
        price: dollars for a device-hour, or None.
    """

    name: str
    devices: int
    speed: float
    mfu: float
    price: float | None

    def days(self, flops: float) -> float:
        """Returns the days that FLOPs take."""
        return flops / self.speed / DAY

    def dollars(self, flops: float) -> float | None:
        """Returns what FLOPs cost, if there is a price."""
        return None if self.price is None else self.days(flops) * 24 * self.devices * self.price

    def flops_of(self, value: float, unit: str) -> float:
        """Returns the FLOPs of a number of "days", or of "dollars" where there is a price."""
        if unit == "days":
            return value * DAY * self.speed
        assert self.price is not None
        return value / self.price / self.devices * 3600 * self.speed


class Budget(NamedTuple):
    """Model FLOPs to spend, and the machine that they are spent on, if that is known."""

    flops: float
    machine: Machine | None
