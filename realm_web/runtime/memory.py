"""The memory of the machine itself, which a software device shares with everything else."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory() -> int:
    """Bytes that programs can still have; 0 where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0
