"""Measuring in a process of its own: what it held at most."""

import json
import subprocess
import sys
from pathlib import Path


def held(key: str) -> int:
    """Bytes of a line of ``/proc/self/status`` of Linux: ``VmRSS`` is what is held now, ``VmHWM`` the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> int:
    """Let ``VmHWM`` start again from what is held now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return held("VmHWM")


def in_a_process(script: str, *words: object) -> dict[str, float]:
    """Run ``script --measure WORDS``, which prints one JSON object in its last line.

    Raises:
        RuntimeError: it failed, with what it said.
    """
    command = [sys.executable, script, "--measure", *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
