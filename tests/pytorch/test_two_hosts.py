"""Loading on ranks of two hosts that share nothing but a network: two network namespaces, joined by a cable.

It needs Linux and the right to make network namespaces, which root has.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

from test_ranks import SUPPORT, expected_parts, write  # noqa: E402 it needs PyTorch

ADDRESSES = "10.77.0.1", "10.77.0.2"


class Hosts:
    """Two hosts; ranks 0 and 1 run on the first one, and ranks 2 and 3 on the second."""

    def __init__(self):
        self.names = tuple(f"nd{os.getpid()}{end}" for end in "ab")
        self._commands = []

    def __enter__(self):
        first, second = self.names
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", first, "type", "veth", "peer", "name", second)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("link", "set", name, "netns", name)
                ip("-n", name, "address", "add", f"{address}/24", "dev", name)
                for device in (name, "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            pytest.skip(f"cannot make network namespaces: {error.stderr.strip()}")
        return self

    def __exit__(self, *error):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def run(self, folders, scenario):
        """What each rank finds."""
        processes = []
        for rank in range(4):
            name = self.names[rank // 2]
            environment = os.environ | {
                "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": name, "RANKS_GROUP": f"tcp://{ADDRESSES[0]}:29577",
                "RANKS_CABLE": name,
            }  # fmt: skip
            script = sys.executable, SUPPORT, str(rank), "4", folders[rank // 2], scenario
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(["ip", "netns", "exec", name, *script], env=environment, **streams))
        outputs = [process.communicate(timeout=200) for process in processes]
        found = []
        for out, error in outputs:
            lines = [json.loads(line)[1] for line in out.splitlines() if line.startswith("[")]
            assert len(lines) == 1, error
            found += lines
        return found


def ip(*arguments):
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip")
    with Hosts() as hosts:
        yield hosts


@pytest.fixture
def folders(tmp_path):
    """The disks of the two hosts; only the first one has the file."""
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()
    write(folders[0] / "model.gguf")
    return folders


def test_a_host_without_the_file_receives_its_parts(hosts, folders):
    assert hosts.run(folders, "values") == expected_parts(folders[0], 4)


def test_both_hosts_have_the_file(hosts, folders):
    shutil.copy(folders[0] / "model.gguf", folders[1])
    assert hosts.run(folders, "values") == expected_parts(folders[0], 4)


def test_all_ranks_end_with_an_error_if_the_network_fails(hosts, folders):
    """At the latest after the timeout of the group, 20 seconds."""
    for found in hosts.run(folders, "cable"):
        assert found.startswith("DeviceError: rank "), found
        assert "cannot communicate with the other ranks" in found
