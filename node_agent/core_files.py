"""No core files: a crash must not write a prompt to disk.

A core file is the memory of a process, and the memory of an agent or engine holds what buyers say.
The limit is inherited by every child. On Linux it is one byte instead of none: both stop core files, but only
one also stops the kernel from piping the core into a collector (`|` in core_pattern; man 5 core).
"""

import sys
from typing import Final

CORE_BYTES: Final = 1 if sys.platform == "linux" else 0


def forbid_core_files() -> None:
    """Let neither this process nor its children leave a core file. Windows writes none by itself."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (CORE_BYTES, CORE_BYTES))
