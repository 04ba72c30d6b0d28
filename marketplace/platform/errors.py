"""What the platform raises.

PlatformError
├── SetupFault        this machine lacks something; the message says what to do
│   ├── PortInUse
│   └── AlreadyRunning
└── ServerFault       an embedded server did not start or died
"""

from __future__ import annotations


class PlatformError(Exception):
    """Root of everything the platform raises on purpose."""


class SetupFault(PlatformError):
    """This machine lacks something; the message says what to do."""


class PortInUse(SetupFault):
    """Another process listens on a port we were told to use."""


class AlreadyRunning(SetupFault):
    """Another process owns this data folder."""


class ServerFault(PlatformError):
    """An embedded server did not start, or died."""
