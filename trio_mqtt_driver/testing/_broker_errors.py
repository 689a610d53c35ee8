"""What can be the matter with a real broker."""

from __future__ import annotations


class BrokerNotInstalledError(Exception):
    """The broker's program is not on this machine; the message says what to install."""


class BrokerFailedError(Exception):
    """The broker did not start, or ended by itself; the message has the end of its log."""
