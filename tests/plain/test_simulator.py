import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_kernels_under_the_simulator():
    """Numba's simulator is chosen when Numba is imported, so these tests get a process of their own."""
    tests = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests / "simulator")],
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert " passed" in found.stdout
    assert "skipped" not in found.stdout
