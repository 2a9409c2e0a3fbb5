"""The driver broke the rules. Layer: virtio."""

from __future__ import annotations


class DriverFault(Exception):
    """The guest's driver did what virtio forbids: the device stops and asks for a reset (2.1.2, DEVICE_NEEDS_RESET).

    The message names the rule and its section of the virtio 1.2 specification.
    """
