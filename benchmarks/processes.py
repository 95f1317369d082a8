"""Measure peak memory in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path


def held(key: str) -> int:
    """Read a line of Linux's ``/proc/self/status`` in bytes: ``VmRSS`` is resident memory, ``VmHWM`` its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> int:
    """Reset ``VmHWM`` to the current resident memory, and return it."""
    Path("/proc/self/clear_refs").write_text("5")
    return held("VmHWM")


def in_a_process(script: str, *words: object) -> dict[str, float]:
    """Run ``script --measure WORDS``, which prints one JSON object in its last line.

    Raises:
        RuntimeError: the script failed; the message has its standard error.
    """
    command = [sys.executable, script, "--measure", *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
