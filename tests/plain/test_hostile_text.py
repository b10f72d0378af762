"""Text of a hostile file reaches no terminal, no page and no message as it is."""

import contextlib
import io
import json
import os
import struct
import traceback
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from gguf_bytes import STRING, UINT8, entry, floats, gguf, value

import numba_dequant as nd
from numba_dequant.cli import main
from numba_dequant.loading import host_loader, progress
from numba_dequant.parallel import Part, Plan, RankPlan, Shard, llama_rules, plan

BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\U000e0041"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>'\"&lt;"
STEERING = f"\x1b[2J\x1b]0;owned\x07\x9b31m\x08\x7f\rRETURN\nLINE\u2028LINE\u2029LINE{BIDIRECTIONAL}{INVISIBLE}{MARKUP}"
NAME = f"blk.0.{STEERING}"


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A model of which every name, key, string and path is hostile."""
    folder = tmp_path / f"{STEERING.replace('/', '')}\udcff"[:90]
    folder.mkdir()
    path = folder / f"m{STEERING.replace('/', '')[:70]}\udcff.gguf"
    entries = [
        value("general.architecture", STRING, STEERING),
        value(f"key{STEERING}\0{STEERING}", STRING, f"{STEERING}\0{STEERING}".encode() + b"\xff\xed\xa0\x80"),
        value(f"array{STEERING}", STRING, [STEERING, b"\xff", "\0"]),
        value(f"long{STEERING}", STRING, STEERING * 20_000),
        value("tokenizer.chat_template", STRING, STEERING),
    ]
    content = gguf([(NAME, *floats(4, 32)), ("a" + NAME, *floats(2, 2))], entries)
    path.write_bytes(content)
    return SimpleNamespace(path=path, content=content, model=nd.open(path), monkeypatch=monkeypatch)


def command(*arguments):
    out = io.StringIO()
    exits = contextlib.suppress(SystemExit)  # of argparse
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), exits:
        main.main([os.fspath(each) for each in arguments])
    return out.getvalue()


def message(call):
    """The error of a call as Python shows it, and as a program may show it."""
    try:
        call()
    except nd.NumbaDequantError as error:
        parts = [str(error), repr(error), getattr(error, "reason", ""), getattr(error, "strerror", "") or ""]
        return "\n".join([*map(str, parts), "".join(traceback.format_exception_only(error))])
    raise AssertionError("no error")


def warned(hostile):
    os.utime(hostile.path, (1, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hostile.model.load(NAME, device="reference")
    assert len(caught) == 1
    return str(caught[0].message)


def changed(hostile):
    hostile.path.write_bytes(hostile.content + bytes(32))
    return message(lambda: hostile.model.load(NAME, device="cpu"))


def gone(hostile):
    hostile.path.unlink()
    more = [message(lambda: hostile.model.load_all(device="cpu")), hostile.model._repr_html_().replace(MARKUP, "")]
    return "\n".join([*more, repr(hostile.model.metadata), message(hostile.model.metadata[f"array{STEERING}"].to_list)])


def out_of_memory(hostile):
    def fail(*arguments, **options):
        raise MemoryError

    hostile.monkeypatch.setattr(np, "empty", fail)
    return message(lambda: hostile.model.read(NAME))


def bar(hostile):
    hostile.monkeypatch.setattr(progress, "DELAY", 0)
    hostile.monkeypatch.setattr(progress, "INTERVAL", 0)
    hostile.monkeypatch.setattr(host_loader, "CHUNK_BYTES", 128)
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        hostile.model.load_all(device="cpu", progress=True)
    assert "B/s" in out.getvalue()
    return out.getvalue().replace("\r", "\n")  # tqdm's own


def plan_of_another_model(hostile):
    tensor = hostile.model.tensors[NAME]._replace(shape=(1, 128))
    other = Plan((RankPlan(0, 0, {NAME: Part(tensor)}),), ())
    return message(lambda: hostile.model.load_all(device=["cpu"], plan=other))


def plan_of_a_large_group(hostile):
    tensors = nd.open(gguf([(f"{NAME}{number}", *floats(1)) for number in range(1000)])).tensors.values()
    shown = str(plan(tensors, 3, [("*", Shard(0, group="g"))]))
    assert "and 990 more: 1 rows" in shown
    assert len(shown) < 3000
    return shown


def broken(*tensors, entries=(), cut=None):
    return lambda hostile: message(lambda: nd.open(gguf(tensors, entries)[:cut]))


def a_missing_shard(hostile):
    path = hostile.path.with_name(f"{STEERING.replace('/', '')[:60]}-00001-of-00002.gguf")
    path.write_bytes(gguf(entries=[value("split.count", UINT8, 2), value("split.no", UINT8, 0)]))
    missing = repr(nd.open(path, allow_truncated=True))
    return "\n".join([message(lambda: nd.open(path)), missing, command("info", path)])


def a_similar_model(hostile):
    path = hostile.path.with_name("other.gguf")
    path.write_bytes(gguf([(NAME, *floats(5, 32))], [value(f"array{STEERING}", STRING, [STEERING, STEERING])]))
    return path


TEXTS = {
    "repr of a model": lambda hostile: repr(hostile.model),
    "repr of metadata": lambda hostile: repr(hostile.model.metadata),
    "repr of tensors": lambda hostile: repr(hostile.model.tensors),
    "repr of a tensor": lambda hostile: repr(hostile.model.tensors[NAME]),
    "repr of an array": lambda hostile: repr(hostile.model.metadata[f"array{STEERING}"]),
    "repr of a source": lambda hostile: repr(hostile.model.tensors[NAME].source),
    "JSON": lambda hostile: json.dumps(dict(hostile.model.metadata)),
    "info": lambda hostile: command("info", hostile.path),
    "info --json": lambda hostile: command("info", hostile.path, "--json"),
    "diff": lambda hostile: command("diff", hostile.path, a_similar_model(hostile)),
    "convert": lambda hostile: command("convert", hostile.path, hostile.path.with_suffix(".safetensors")),
    "convert to a wrong place": lambda hostile: command("convert", hostile.path, hostile.path),
    "verify": lambda hostile: command("verify", hostile.path, "--device", "cpu"),
    "show": lambda hostile: command("show", hostile.path, "a" + NAME),
    "show a missing tensor": lambda hostile: command("show", hostile.path, NAME[:-1]),
    "show a missing file": lambda hostile: command("show", f"{hostile.path}x.gguf"),
    "a wrong argument": lambda hostile: command("info", hostile.path, STEERING),
    "bench": lambda hostile: command("bench", "--formats", STEERING),
    "a progress bar": bar,
    "a warning": warned,
    "a missing tensor": lambda hostile: message(lambda: hostile.model.tensors[NAME[:-1]]),
    "no type for a tensor": lambda hostile: message(lambda: hostile.model.load_all(dtype={"x": "float16"})),
    "wrong rows": lambda hostile: message(
        lambda: nd.open(gguf([(NAME, (), "F32", bytes(4))])).load(NAME, rows=slice(1))
    ),
    "a wrong out": lambda hostile: message(
        lambda: hostile.model.load_all(device="cpu", out={NAME: np.empty(3, np.float16)})
    ),
    "an out of no tensor": lambda hostile: message(lambda: hostile.model.load_all(out={STEERING: None})),
    "a read-only array": lambda hostile: message(hostile.model.metadata[f"array{STEERING}"].clear),
    "a file that has changed": changed,
    "a file that is gone": gone,
    "out of memory": out_of_memory,
    "a missing file": lambda hostile: message(lambda: nd.open(f"{hostile.path}x")),
    "a folder": lambda hostile: message(lambda: nd.open(hostile.path.parent)),
    "a missing shard": a_missing_shard,
    "a limit": lambda hostile: message(lambda: nd.open(hostile.path, limits=nd.Limits(string_bytes=1))),
    "a dimension that is not there": lambda hostile: message(
        lambda: plan(hostile.model.tensors.values(), 2, [("*", Shard(5))])
    ),
    "a group of two lengths": lambda hostile: message(
        lambda: plan(
            nd.open(gguf([(NAME, *floats(2)), (NAME + "x", *floats(3))])).tensors.values(),
            2,
            [("*", Shard(0, group="g"))],
        )
    ),
    "a plan": lambda hostile: str(plan(hostile.model.tensors.values(), 3, [("*", Shard(0))])),
    "a plan of a large group": plan_of_a_large_group,
    "a plan that refuses": lambda hostile: message(
        lambda: plan(hostile.model.tensors.values(), 3, [("*", Shard(0))], uneven="refuse")
    ),
    "a plan of another model": plan_of_another_model,
    "rules": lambda hostile: message(lambda: llama_rules(hostile.model.metadata)),
    "an explanation": lambda hostile: "\n".join(
        nd.explain(hostile.model.read(NAME), "F32")._repr_mimebundle_().values()
    ).replace("\t", " "),
    "a file cut short": broken((NAME, *floats(64)), cut=-200),
    "a header cut short": broken((NAME, *floats(64)), cut=300),
    "a name twice": broken((NAME, *floats(1)), (NAME, *floats(1))),
    "a name with a NUL": broken((f"{NAME}\0x", *floats(1))),
    "a name that is not UTF-8": broken((NAME.encode() + b"\xff", *floats(1))),
    "an unknown type": broken((NAME, (32,), 99, bytes(32))),
    "too many dimensions": broken((NAME, (1,) * 9, "F32", bytes(4))),
    "rows that are not whole blocks": broken((NAME, (5,), "Q8_0", bytes(34))),
    "a key twice": broken(entries=[value(STEERING, UINT8, 1), value(STEERING, UINT8, 1)]),
    "a key that is not UTF-8": broken(entries=[entry(STEERING.encode() + b"\xff", UINT8, b"\1")]),
    "an unknown value type": broken(entries=[entry(STEERING, 99, b"")]),
    "an array of arrays": broken(entries=[entry(STEERING, 9, struct.pack("<IQ", 9, 1))]),
    "no GGUF": lambda hostile: message(lambda: nd.open(STEERING.encode() + b"\0")),
    "text": lambda hostile: message(lambda: nd.open(np.frombuffer(b"a\r\n\tb" + MARKUP.encode(), np.uint8))),
}

PAGES = {
    "a model": lambda hostile: hostile.model._repr_html_(),
    "tensors": lambda hostile: hostile.model.tensors._repr_html_(),
    "a tensor": lambda hostile: hostile.model.tensors[NAME]._repr_html_(),
    "metadata that cannot be read": lambda hostile: (hostile.path.unlink(), hostile.model._repr_html_())[1],
}


def assert_steers_nothing(text):
    assert {character for character in text if not character.isprintable()} <= {"\n"}
    assert not [line for line in text.splitlines() if line.startswith(("LINE", "RETURN"))]
    text.encode()


@pytest.mark.parametrize("place", TEXTS)
def test_text(place, hostile):
    found = TEXTS[place](hostile)
    assert found
    assert_steers_nothing(found)


@pytest.mark.parametrize("place", PAGES)
def test_page(place, hostile):
    found = PAGES[place](hostile)
    assert "alert(1)" in found
    assert_steers_nothing(found)
    for markup in ("<script", "<img"):
        assert markup not in found


def test_what_is_asked_for_is_as_it_stands(hostile):
    """Data is not changed: only what is shown is."""
    assert list(hostile.model.tensors) == [NAME, "a" + NAME]
    assert hostile.model.metadata["general.architecture"] == STEERING
    assert hostile.model.metadata[f"array{STEERING}"][0] == STEERING
    assert hostile.model.path == os.fspath(hostile.path)
    with pytest.raises(nd.ReadError) as caught:
        nd.open(f"{hostile.path}x")
    assert caught.value.filename == caught.value.path == f"{hostile.path}x"
