"""Signals at moments when a KeyboardInterrupt would not arrive."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# As torch and NumPy have places that do it.
DROPS_EXCEPTIONS = """
import os
try:
    os.kill(os.getpid(), {number})
except BaseException:
    pass
"""
COMMAND = "from msf.cli import signals; signals.interrupt(); import dropping; print('went on')"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_library_is_imported_ends_the_command(tmp_path: Path, number: int) -> None:
    (tmp_path / "dropping.py").write_text(DROPS_EXCEPTIONS.format(number=int(number)))
    command = f"import sys; sys.path.append({str(tmp_path)!r}); {COMMAND}"
    process = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr == "msf: interrupted\n"
