"""Published weaknesses of other readers of GGUF files: the file that broke them is refused here, or loads.

Each test has the name of its weakness: a CVE, or a project and the number of its issue or pull request.
"""

import os
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from blocks import random_blocks
from gguf_bytes import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT8, UINT32, UINT64, entry, floats, gguf, text, value

import numba_dequant as nd

MIB = 1 << 20
MOST_MEMORY = 4 * MIB
MOST_SECONDS = 0.5


def header(n_tensors=0, n_entries=0, rest=b""):
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_entries) + rest


def array(kind, count, rest=b""):
    return entry("k", ARRAY, struct.pack("<IQ", kind, count) + rest)


def tensor(name, extents, ggml_id, offset):
    return text(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, ggml_id, offset)


def table(*tensors):
    head = header(len(tensors), 0, b"".join(tensors))
    return head + bytes(-len(head) % 32)


F32, F16, Q4_0, F64, LARGEST = 0, 1, 2, 28, 2**64 - 1

# Four tensors of 2**62 bytes are 2**64 bytes, which is 0 as a 64-bit integer.
HUGE = [tensor(f"t{number}", [2**57, 4], F64, number << 62) for number in range(3)]

WEAKNESSES = {
    # llama.cpp: the counts of the header, times the size of an entry, wrapped around.
    "CVE-2024-23605": (header(0, 2**64 // 48 + 1), "metadata count is 384307168202282326, but the rest"),
    "CVE-2024-21836": (header(2**64 // 88 + 1, 0), "tensor count is 209622091746699451, but the rest"),
    # llama.cpp: a length of 2**64 - 1, plus one for a NUL, was 0.
    "CVE-2024-23496, key": (header(0, 1, struct.pack("<Q", LARGEST) + bytes(99)), "has 18446744073709551615 bytes"),
    "CVE-2024-23496, value": (
        header(0, 1, text("k") + struct.pack("<IQ", STRING, LARGEST) + bytes(99)),
        "metadata 'k' has 18,446,744,073,709,551,615 bytes; the limit is",
    ),
    "CVE-2024-23496, name": (header(1, 0, struct.pack("<Q", LARGEST) + bytes(99)), "has 18446744073709551615 bytes"),
    # llama.cpp: more dimensions than the array for them.
    "CVE-2024-21802": (
        header(1, 0, text("t") + struct.pack("<I", 9) + bytes(999)),
        "tensor 't' has 9 dimensions; at most 8",
    ),
    # llama.cpp: the number of items, times their size, wrapped around.
    "CVE-2024-21825, strings": (header(0, 1, array(STRING, 2**60) + bytes(99)), "'k' has 1152921504606846976 items"),
    "CVE-2024-21825, numbers": (header(0, 1, array(UINT64, 2**61) + bytes(99)), "'k' has 2305843009213693952 items"),
    "CVE-2024-21825, in the limit": (header(0, 1, array(STRING, 2**26) + bytes(99)), "536870912 more bytes are needed"),
    # llama.cpp: the sum of the sizes of all tensors wrapped around, so that the last tensor seems to be at the start.
    "CVE-2025-53630": (
        table(*HUGE, tensor("t3", [2**57, 4], F64, 3 << 62), tensor("end", [8], F32, 0)),
        "tensor 'end' has offset 0; it must be 18446744073709551616",
    ),
    # llama.cpp: this sum, plus the memory for the table of tensors, wrapped around.
    "CVE-2026-27940": (
        table(*HUGE, tensor("t3", [2**57 - 40, 4], F64, 3 << 62)),
        "the file has .* bytes, but tensor 't0' ends at byte 4611686018427388",
    ),
    # llama.cpp: the size of one tensor wrapped around.
    "CVE-2026-33298": (
        table(tensor("t", [2**32, 2**32, 4], F32, 0)),
        r"tensor 't' has shape \(4, 4294967296, 4294967296\); use fewer",
    ),
    "CVE-2026-33298, quantized": (
        table(tensor("t", [2**59, 1], Q4_0, 0)),
        "but tensor 't' ends at byte 324259173170675808",
    ),
    # Ollama: the shape of a tensor needs more bytes than the file has; what lies behind them in memory was returned.
    "CVE-2026-7482": (
        table(tensor("t", [1000, 1000], F16, 0)) + bytes(64),
        "but tensor 't' ends at byte 2000096 ",
    ),
    # Ollama: a file of four bytes; alignments that were divided by; counts and lengths for which memory was allocated.
    "CVE-2024-39720": (b"GGUF", "version: 4 more bytes are needed, but only 0 are left"),
    "CVE-2025-0317": (gguf(entries=[value("general.alignment", UINT32, 0)]), "general.alignment is 0; it must be a"),
    "CVE-2025-0315": (table(tensor("t", [2**40, 2**18], F32, 0)), "but tensor 't' ends at byte 1152921504606847072"),
    "ollama#17042": (header(0, 1, array(FLOAT32, 2**26) + bytes(99)), "268435456 more bytes are needed, but only 99"),
    # MLX: data, strings, arrays and dimensions beyond the map of the file; a size that was cut to 32 bits.
    "CVE-2025-62609": (table(tensor("t", [8], F32, 2**63)), "tensor 't' has offset 9223372036854775808; it must be 0"),
    "mlx#4136": (table(tensor("t", [8], F32, 1 << 40)), "tensor 't' has offset 1099511627776; it must be 0"),
    "mlx#4213, string": (
        header(0, 1, text("k") + struct.pack("<IQ", STRING, 4 * MIB)),
        "metadata 'k': 4194304 more bytes are needed, but only 0 are left",
    ),
    "mlx#4213, array": (header(0, 1, array(UINT32, MIB)), "4194304 more bytes are needed, but only 0 are left"),
    "mlx#4244": (table(tensor("t", [2**16, 2**16], Q4_0, 0)), "but tensor 't' ends at byte 2415919200"),
    "mlx#3358": (
        header(1, 0, text("t") + struct.pack("<I", 200) + bytes(2000)),
        "tensor 't' has 200 dimensions; at most 8 are allowed",
    ),
    # huggingface.js: lengths and counts without a limit; recursion; an item type that does not exist.
    "huggingface.js#2020, array": (header(0, 1, array(UINT8, 2**40) + bytes(99)), "'k' has 1099511627776 items"),
    "huggingface.js#2020, entries": (header(0, 2**32, bytes(99)), "metadata count is 4294967296, but the rest"),
    "huggingface.js#2020, tensors": (header(2**32, 0, bytes(99)), "tensor count is 4294967296, but the rest"),
    "huggingface.js#2028, string": (
        header(0, 1, text("k") + struct.pack("<IQ", STRING, 2**53 + 1)),
        "metadata 'k' has 9,007,199,254,740,993 bytes; the limit is",
    ),
    "huggingface.js#2028, dimensions": (
        header(1, 0, text("t") + struct.pack("<I", 2**32 - 1) + bytes(999)),
        "tensor 't' has 4294967295 dimensions; at most 8",
    ),
    "huggingface.js#2028, recursion": (
        header(0, 1, array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 50_000)),
        "metadata 'k' is an array of arrays",
    ),
    "huggingface.js#2028, item type": (header(0, 1, array(99, 1) + bytes(99)), "of the unknown value type 99"),
    # gguf-py: this file of 49 bytes was never read to its end.
    "llama.cpp#27188": (header(0, 1, array(UINT8, 2**63)), "'k' has 9223372036854775808 items"),
    # llama.cpp: a string and an array that the file has no bytes for were allocated.
    "llama.cpp#19856, string": (header(0, 1, text("k") + struct.pack("<IQ", STRING, 1 << 26)), "67108864 more bytes"),
    "llama.cpp#19856, array": (header(0, 1, array(INT32, 1 << 26)), "268435456 more bytes are needed"),
    # llama.cpp: a division by an extent of 0, and an assertion on the type of the alignment.
    "llama.cpp#25596, type": (
        gguf(entries=[value("general.alignment", INT32, 32)]),
        "general.alignment is a value of type 5; it must be a uint32",
    ),
    "llama.cpp#25596, 0": (table(tensor("t", [2**62, 0], F32, 0)), "use fewer than 2\\*\\*60 elements"),
    # ggml: an alignment of 1 GiB pads each tensor to 1 GiB.
    "ggml#1516": (gguf(entries=[value("general.alignment", UINT32, 1 << 30)]), "a power of two up to 1 MiB"),
    # ds4: a table of 2**32 entries was allocated for a file of 24 bytes.
    "ds4#545": (header(0, 2**32), "metadata count is 4294967296, but the rest of the file has room for 0"),
}


@pytest.mark.parametrize("weakness", WEAKNESSES)
def test_refused(weakness, tmp_path):
    file, message = WEAKNESSES[weakness]
    path = tmp_path / "m.gguf"
    path.write_bytes(file)
    nd.open(gguf())
    for source in (path, file):
        tracemalloc.start()
        start = time.process_time()
        with pytest.raises(nd.GgufError, match=message):
            nd.open(source)
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MEMORY
        assert seconds < MOST_SECONDS


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_all_of_them_need_little_address_space(tmp_path):
    """What is reserved but not touched is no memory for `tracemalloc`, and counts here."""
    for number, (file, _) in enumerate(WEAKNESSES.values()):
        (tmp_path / f"{number:02}.gguf").write_bytes(file)
    code = """
import pathlib, resource, sys
import numba_dequant as nd
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (32 << 20),) * 2)
paths = sorted(pathlib.Path(sys.argv[1]).iterdir())
for path in paths:
    for allow_truncated in (False, True):
        try:
            model = nd.open(path, allow_truncated=allow_truncated)
            assert allow_truncated
            model._repr_html_()
            model.load_all(device="reference")
        except nd.GgufError:
            pass
        else:
            raise AssertionError(path)
print(len(paths))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert found.stdout == f"{len(WEAKNESSES)}\n", found.stderr


def test_cve_2026_7482_no_way_to_a_tensor_returns_memory_behind_the_file(tmp_path):
    """Also where the file was allowed to be incomplete, and where it becomes shorter after it was opened."""
    path = tmp_path / "m.gguf"
    whole = table(tensor("t", [32, 1000], F16, 0)) + bytes(64_000)
    path.write_bytes(whole)
    shortened = nd.open(path)
    path.write_bytes(whole[:1000])
    incomplete = [nd.open(source, allow_truncated=True) for source in (path, whole[:1000])]
    uses = [
        lambda model: model.load("t", device="cpu"),
        lambda model: model.load("t", device="reference", rows=slice(999, 1000)),
        lambda model: model.load("t", device="cpu", keep_quantized=True),
        lambda model: model.load_all(device="cpu"),
        lambda model: list(model.stream(device="reference")),
        lambda model: model.read("t"),
        lambda model: model.read("t", mmap=True),
    ]
    for model in (shortened, *incomplete):
        for use in uses:
            with pytest.raises(nd.GgufError, match="ends at byte"):
                use(model)


ROWS = (1 << 32) + 64


def test_cve_2026_53923_rows_beyond_2_to_the_32_are_not_other_rows(tmp_path):
    """vLLM and vllm-gguf-plugin#127: numbers of elements, rows and columns were cut to 32 bits."""
    path = tmp_path / "m.gguf"
    head = table(tensor("t", [32, ROWS], Q4_0, 0))
    blocks = random_blocks("Q4_0", 64)
    try:
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + 18 * ROWS)
            file.seek(len(head) + 18 * (1 << 32))
            file.write(blocks)
    except OSError:
        pytest.skip("this disk has no sparse files of this size")
    model = nd.open(path)
    assert model.tensors["t"].n_elements == 32 * ROWS
    for device in ("cpu", "reference"):
        last = model.load("t", "float32", device=device, rows=slice(1 << 32, None))
        expected = nd.dequantize(blocks, "Q4_0", "float32", shape=(64, 32), device="reference")
        np.testing.assert_array_equal(last.view(np.uint32), expected.view(np.uint32))
        assert not model.load("t", "float32", device=device, rows=slice(64)).any()
        with pytest.raises(nd.DeviceError):
            model.load("t", "float32", device=device)


@pytest.mark.parametrize("name", [fmt.name for fmt in nd.FORMATS.values()])
def test_cve_2026_53923_every_value_of_a_result_is_written(name):
    """The rest of a result that is not written whole is memory that somebody else has used."""
    n_blocks = 1031 if nd.FORMATS[name].block_size > 1 else 4099
    blocks = random_blocks(name, n_blocks)
    values = nd.dequantize(blocks, name, "float32", device="reference")
    for byte in (0x00, 0xA5):
        out = np.frombuffer(bytearray([byte]) * values.nbytes, values.dtype).reshape(values.shape)
        nd.dequantize(blocks, name, "float32", device="cpu", out=out)
        np.testing.assert_array_equal(out, values)


def test_cve_2025_49847_a_token_of_more_than_2_gib(tmp_path):
    """llama.cpp: the length of a token was cut to 32 bits, and was then negative."""
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(header(0, 1, array(STRING, 100) + text("x") * 99 + struct.pack("<Q", 2**31 + 5)))
        file.truncate(file.tell() + 2**31 + 5)
    with pytest.raises(nd.GgufError, match=r"metadata 'k' has 2,147,483,653 bytes; the limit is 67,108,864\."):
        nd.open(path)


def test_cve_2025_0312_a_model_without_tensors_or_keys_has_none():
    """Ollama: a null pointer was dereferenced for a file without what was looked for."""
    for file in (gguf(), gguf([("t", (), "F32", bytes(4))]), gguf([("t", (0,), "F32", b"")])):
        model = nd.open(file)
        assert model.metadata.get("general.architecture") is None
        assert list(model.load_all(device="cpu")) == list(model.tensors)
        assert model._repr_html_()


HOOKED = """
import sys
import numba_dequant as nd
model = nd.open(sys.argv[1])
model.load_all(device="reference"), model._repr_html_()  # imports what they need
events = []
sys.addaudithook(lambda event, arguments: events.append((event, arguments)))
model = nd.open(sys.argv[1])
dict(model.metadata), repr(model.metadata), repr(model), model._repr_html_()
model.metadata["tokenizer.ggml.tokens"].to_list()
model.load_all(device="reference")
wrong = [each for each in events if each[0].startswith(("exec", "compile", "import", "os.system", "subprocess",
         "os.exec", "os.posix_spawn", "pickle", "marshal", "ctypes.dlopen", "socket", "urllib"))]
print(sorted({str(arguments[0]) for event, arguments in events if event == "open"}), wrong)
"""


def test_cve_2024_34359_and_cve_2026_5760_a_chat_template_is_text(tmp_path):
    """llama-cpp-python and SGLang rendered the template of a file. Nothing in a file is run, imported or opened."""
    template = "{{ ''.__class__.__mro__[1].__subclasses__()[0]('touch owned') }}"
    entries = [
        value("tokenizer.chat_template", STRING, template),
        value("general.architecture", STRING, "../../../../etc/passwd"),
        value("general.source.url", STRING, "file:///etc/passwd"),
        value("quantize.imatrix.file", STRING, "/etc/passwd"),
        value("split.path", STRING, "/etc/passwd"),
        value("tokenizer.ggml.tokens", STRING, ["/etc/passwd", "__import__('os')", "$(touch owned)"]),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([("/etc/passwd", *floats(2)), ("../../x", *floats(2))], entries))
    assert nd.open(path).metadata["tokenizer.chat_template"] == template
    found = subprocess.run(
        [sys.executable, "-c", HOOKED, str(path)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert found.stdout == f"{[str(path)]} []\n"
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_llama_cpp_26690_an_array_of_another_type_is_read_as_its_own():
    """llama.cpp: scores and token types were read as four bytes each, whatever their type."""
    for kind in (UINT8, BOOL, FLOAT32, UINT64):
        metadata = nd.open(gguf(entries=[value("tokenizer.ggml.scores", kind, [1, 0, 1])])).metadata
        assert metadata["tokenizer.ggml.scores"] == [1, 0, 1]


def test_llama_cpp_25596_a_shape_without_elements_divides_nothing():
    for shape in ((0,), (4, 0), (0, 4), (3, 0, 2), (0, 0)):
        model = nd.open(gguf([("t", shape, "F32", b"")]))
        assert model.load("t", device="cpu").shape == shape
