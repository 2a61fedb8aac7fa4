"""Programs that are killed in the middle of their work."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests import fork_server

ROOT = Path(__file__).parents[2]


def run_until_killed(code: str, *arguments: str) -> None:
    """Run Python code in a process of its own, which must end by SIGKILL."""
    run = subprocess.run(
        fork_server.command("-c", code, *arguments),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
