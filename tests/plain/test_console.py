"""The command with streams that take little or nothing, with names that would steer a terminal, and with Ctrl-C."""

import ctypes
import io
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from blocks import DECODED, random_blocks, write_model

import numba_dequant as nd
from numba_dequant import display
from numba_dequant.cli import console, info, main, verify, warm

COMMAND = [sys.executable, "-W", "error", "-m", "numba_dequant"]
SAMPLE = str(verify.SAMPLE)
NARROW = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "cp1252"},
    {"PYTHONIOENCODING": "utf-8:strict"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]

needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
needs_byte_names = pytest.mark.skipif(sys.platform != "linux", reason="names of files are text here")


def run(*arguments, **variables):
    return subprocess.run([*COMMAND, *arguments], env=os.environ | variables, capture_output=True, check=False)


@pytest.fixture
def model(tmp_path):
    """With what byte-pair vocabularies hold, and what no encoding but Unicode's has."""
    tensors = {"blk.0.Ġ": ("Q8_0", (2, 32), random_blocks("Q8_0", 2)), "last": ("F32", (1,), bytes(4))}
    return str(write_model(tmp_path / "model.gguf", tensors, [("merges", "Ġ Ġ"), ("name", "模型 ▁ 🙂")]))


@pytest.mark.parametrize("variables", NARROW, ids=lambda each: " ".join(each.values()))
@pytest.mark.parametrize("command", ["info", "show"])
def test_every_encoding_is_enough(model, command, variables):
    found = run(command, model, **variables)
    assert found.returncode == 0, found.stderr
    assert found.stderr == b""
    last = {"info": b"last ", "show": b"value of element 0: "}
    assert found.stdout.splitlines()[-1].startswith(last[command])


def test_what_an_encoding_lacks_is_escaped_and_pictures_stay_pictures(model):
    shown = run("info", model, PYTHONIOENCODING="ascii").stdout.decode("ascii")
    assert "blk.0.\\u0120" in shown
    assert "\\U0001f642" in shown
    picture = run("show", "Q4_K", "--element", "3", PYTHONIOENCODING="ascii").stdout.decode("ascii")
    assert "  byte   3  ########  dmin, byte 1\n  byte   4  ..######  scales[0]\n" in picture.replace("\r", "")


def test_an_error_can_be_shown_in_every_encoding(tmp_path):
    found = run("info", str(tmp_path / "模型.gguf"), PYTHONIOENCODING="ascii")
    assert found.returncode == 2
    assert b"\\u6a21\\u578b.gguf" in found.stderr
    assert b"Traceback" not in found.stderr


def test_what_the_user_wants_of_an_encoding_is_done(model):
    assert "blk.0.?" in run("info", model, PYTHONIOENCODING="ascii:replace").stdout.decode("ascii")


@needs_byte_names
@pytest.mark.parametrize("variables", NARROW[::3], ids=lambda each: " ".join(each.values()))
def test_a_file_name_that_is_not_utf8(tmp_path, variables):
    path = os.fsencode(tmp_path) + b"/\xff\xfe.gguf"
    with open(SAMPLE, "rb") as source, open(path, "wb") as target:
        target.write(source.read())
    found = run("info", path, **variables)
    assert found.returncode == 0, found.stderr
    assert b"/\\xff\\xfe.gguf: 2 metadata entries, 35 tensors" in found.stdout
    missing = run("info", path[:-1], **variables)
    assert missing.returncode == 2
    assert b"/\\xff\\xfe.ggu: No such file" in missing.stderr


STEERING = "\x1b]0;owned\x07\x1b[2J\u202e\x9b1m\n\r"


@needs_posix
@pytest.mark.parametrize("arguments", [["info"], ["verify", "--device", "cpu"], ["show"]], ids=lambda each: each[0])
@pytest.mark.parametrize("kind", ["right", "wrong", "missing", "directory", "one too many"])
def test_the_name_of_a_file_does_not_steer_the_terminal(tmp_path, capsys, arguments, kind):
    path = tmp_path / f"a{STEERING}b.gguf"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        write_model(path, {"w": ("Q8_0", (1, 32), random_blocks("Q8_0", 1))})
    if kind == "wrong":
        path.write_bytes(b"GGUF" + bytes(7))
    more = ["x", str(path)] if kind == "one too many" else []
    command, *options = arguments
    try:
        status = main.main([command, str(path), *more, *options])
    except SystemExit as leaving:  # as argparse refuses arguments
        status = leaving.code
    assert status == (0 if kind == "right" else 2)
    shown = "".join(capsys.readouterr())
    assert shown.replace("\n", "").isprintable()
    if command != "show" or kind not in ("right", "one too many"):
        assert r"a\x1b]0;owned\x07\x1b[2J\u202e\x9b1m\n\rb.gguf" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("blk.0.weight", "blk.0.weight"), ("é 模", "é 模"), ("a\nb", "a\\nb"), ("\u200f", "\\u200f"), ("\udcff", "\\xff")],
)
def test_plain(text, shown):
    assert display.printable(text) == shown


def test_a_long_name_does_not_pad_every_line(tmp_path, capsys):
    metadata = [(f"key.{number}", "value") for number in range(500)]
    tensors = {name: ("F32", (1,), bytes(4)) for name in ("w" * 65_535, *map(str, range(100)))}
    path = write_model(tmp_path / "m.gguf", tensors, [*metadata, ("k" * 65_535, "value")])
    assert main.main(["info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 501 + 1 + 101
    assert max(map(len, lines)) < 200


@needs_posix
@pytest.mark.parametrize(
    ("arguments", "closed"),
    [
        (["verify", "MODEL", "--device", "cpu"], "<&- >&- 2>&-"),
        (["info", "MODEL"], ">&-"),
        (["info", "MODEL"], "2>&-"),
        (["info", "MODEL"], "<&- >&- 2>&-"),
        (["show", "Q4_K"], "<&- >&- 2>&-"),
        (["bench", "--device", "cpu", "--formats", "Q8_0"], "<&- >&- 2>&-"),
        (["warm", "--cpu", "--formats", "Q8_0"], ">&-"),
        (["warm", "--cpu", "--formats", "Q8_0"], "<&- >&- 2>&-"),
        (["cache"], "<&- >&- 2>&-"),
        (["--help"], "<&- >&- 2>&-"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else each,
)
def test_a_closed_stream(model, arguments, closed):
    command = [*COMMAND, *(model if each == "MODEL" else each for each in arguments)]
    found = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert bool(found.stdout) == (closed == "2>&-")


@needs_posix
@pytest.mark.parametrize("arguments", [["info", "none.gguf"], ["info"], []], ids=["file", "arguments", "command"])
def test_an_error_with_closed_streams(arguments):
    found = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *COMMAND, *arguments], check=False)
    assert found.returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["info", "none.gguf"], ["info"]], ids=["file", "arguments"])
def test_an_error_that_cannot_be_written(arguments):
    with open("/dev/full", "w") as full:
        assert subprocess.run([*COMMAND, *arguments], stderr=full, check=False).returncode == 2


class Bare:
    """A stream of another program: no `reconfigure`, no file behind it."""

    encoding, errors, closed = "ascii", "strict", False

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text.encode(self.encoding, self.errors).decode()
        return len(text)

    def flush(self):
        pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [Bare, lambda: None, io.StringIO, closed], ids=["bare", "none", "text", "closed"])
def test_a_program_gets_its_streams_back(model, monkeypatch, make):
    streams = make(), make()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert main.main(["info", model]) == 0
    assert main.main(["info", "none.gguf"]) == 2
    assert main.main(["info"]) == 2
    assert (sys.stdout, sys.stderr) == streams
    if isinstance(streams[0], Bare):
        assert "blk.0.\\u0120" in streams[0].text
    elif make is io.StringIO:
        assert "blk.0.Ġ" in streams[0].getvalue()


def test_warnings_are_shown_as_messages(model, monkeypatch, capsys):
    def warn(options):
        warnings.warn("careful\x1b[2J", RuntimeWarning, stacklevel=2)
        return 0

    monkeypatch.setattr(info, "run", warn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        assert main.main(["info", model]) == 0
    assert capsys.readouterr().err == "numba-dequant: careful\\x1b[2J\n"


def test_a_crash_has_a_status_of_its_own(model, monkeypatch, capsys):
    def crash(options):
        raise ZeroDivisionError("a fault\x1b[2J")

    monkeypatch.setattr(info, "run", crash)
    assert main.main(["info", model]) == main.CRASHED == 70
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last):" in shown
    assert "ZeroDivisionError: a fault\\x1b[2J" in shown
    assert "please report" in shown


def test_too_little_memory_is_no_crash(model, monkeypatch, capsys):
    def exhaust(options):
        raise MemoryError

    monkeypatch.setattr(info, "run", exhaust)
    assert main.main(["info", model]) == 2
    assert capsys.readouterr().err == "numba-dequant: out of memory\n"


def test_the_help_names_every_status(capsys):
    assert main.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for status in (0, 1, 2, main.CRASHED, main.INTERRUPTED, main.PIPE_CLOSED):
        assert f"\n  {status:<4} " in shown


def lose_an_interrupt():
    """What Numba does at times: C code calls Python, is interrupted there, and drops the exception."""

    @ctypes.CFUNCTYPE(None)
    def callback():
        signal.raise_signal(signal.SIGINT)

    callback()


def fail_without_the_compiled_object(options):
    lose_an_interrupt()
    raise RuntimeError("no compiled object yet")


def go_on_as_if_nothing_had_been(options):
    lose_an_interrupt()
    time.sleep(60)
    pytest.fail("nothing interrupts it")


def be_done(options):
    lose_an_interrupt()
    return 0


def be_interrupted(options):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "work", [fail_without_the_compiled_object, go_on_as_if_nothing_had_been, be_done, be_interrupted]
)
def test_an_interrupt(work, model, monkeypatch, capsys):
    monkeypatch.setattr(info, "run", work)
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    assert main.main(["info", model]) == main.INTERRUPTED
    assert capsys.readouterr().err == ""
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == (handler, hook)
    time.sleep(2 * console.RETRY_SECONDS)  # nothing is sent after the end


def test_a_program_that_handles_interrupts_keeps_doing_so(model, monkeypatch):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        monkeypatch.setattr(info, "run", lambda options: signal.raise_signal(signal.SIGINT) or 0)
        assert main.main(["info", model]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1]


@needs_posix
def test_an_interrupt_while_other_processes_compile(tmp_path):
    """A terminal sends it to all of them: none says a word, and none is left."""
    environment = os.environ | {"NUMBA_DEQUANT_CACHE_DIR": str(tmp_path)}
    process = subprocess.Popen(
        [*COMMAND, "warm", "--cpu"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not any(tmp_path.iterdir()):  # the first of many functions is there
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    shown = process.communicate(timeout=120)
    assert process.returncode == main.INTERRUPTED
    assert shown == ("", "")
    assert len(list(tmp_path.iterdir())) < len(DECODED)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


class Killed:
    """A task whose process ends as the system ends one that takes too much memory."""

    def run(self):
        os._exit(9)


def test_a_process_that_is_killed_while_it_compiles_is_said(monkeypatch):
    monkeypatch.setattr(warm, "available_cores", lambda: 2)
    with pytest.raises(nd.DeviceError, match="was killed"):
        list(warm.compile_all([Killed(), Killed()]))
