"""Many loads of good and of hostile files at once leave nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import thousand_loads


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory, handles and threads in /proc")
def test_a_thousand_loads_by_eight_threads(tmp_path):
    folders = [Path(__file__).parents[1] / "support", Path(__file__).parents[2]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-W", "error", thousand_loads.__file__, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert not found["faults"]
    assert min(found["files"]) >= 25
    assert found["good"] + found["refused"] == thousand_loads.LOADS
    assert min(found["good"], found["refused"]) > 400
    assert found["growth"]["handles"] == 0
    assert found["growth"]["threads"] <= 0
    assert found["growth"]["MB"] < 8
