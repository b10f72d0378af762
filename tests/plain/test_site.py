"""The docs site: its code runs, what it says of the code is true, its links lead somewhere, and it can be built."""

import ast
import contextlib
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from blocks import random_blocks, write_model

import numba_dequant as nd
from numba_dequant import formats, parallel
from numba_dequant.cli.main import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "numba_dequant"
GENERATED = ("formats", "notebooks", "repository")
"""Folders of pages that each build makes."""
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")),
    *(path for path in sorted(DOCS.rglob("*.md")) if path.relative_to(DOCS).parts[0] not in GENERATED),
]
"""The pages that people and programs write into the repository."""
RUN_HERE = ("quickstart", "loading", "computing", "cpu", "exploring-blocks", "add-a-format")
RUN_ELSEWHERE = {
    "README": "plain/test_readme.py",
    "add-a-kernel": "simulator/test_walk_through.py",
    "launchers": "programs/test_launchers.py",
    "programs": "pytorch/test_pages.py",
    "pytorch": "pytorch/test_pages.py",
    "ranks": "pytorch/test_ranks.py",
    "ranks-cost": "plain/test_docs.py",
    "streams": "pytorch/test_pages.py",
}
"""Page -> the test that runs its Python code."""


def blocks_of(text):
    """Language and text of each block of code."""
    return re.findall(r"^```([\w{}-]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The file `model.gguf` of the pages, in the working directory."""
    ones = np.ones(256, np.float32).tobytes()
    tensors = {
        "blk.0.ffn_norm.weight": ("F32", (256,), ones),
        "blk.0.ffn_up.weight": ("Q4_K", (4, 256), random_blocks("Q4_K", 4)),
    }
    write_model(tmp_path / "model.gguf", tensors, [("general.architecture", "llama")])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def registry():
    """Formats that a page registers are removed."""
    kept = dict(formats._formats), dict(formats._with_id)
    yield
    for now, before in zip((formats._formats, formats._with_id), kept, strict=True):
        now.clear()
        now.update(before)


@pytest.mark.parametrize("page", RUN_HERE)
def test_the_python_code_of_a_page_runs_and_prints_what_the_page_shows(page, model, registry):
    found = blocks_of((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    names, n_run = {}, 0
    for (language, code), (next_language, shown) in zip(found, [*found[1:], ("", "")], strict=True):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            n_run += 1
            if next_language == "text":
                assert out.getvalue() == shown
    assert n_run


def test_each_page_with_python_code_is_run_by_a_test():
    for path in PAGES:
        if any(language == "python" for language, _ in blocks_of(path.read_text(encoding="utf-8"))):
            assert path.stem in {*RUN_HERE, *RUN_ELSEWHERE}, f"{path}: add its code to a test"
    for page, test in RUN_ELSEWHERE.items():
        text = (ROOT / "tests" / test).read_text(encoding="utf-8")
        assert f"{page}.md" in text or (page == "ranks-cost" and "report_ranks.PAGE" in text), (page, test)


def test_the_commands_of_the_quickstart_run(capsys):
    (commands,) = [
        text for _, text in blocks_of((DOCS / "quickstart.md").read_text(encoding="utf-8")) if "pip install" in text
    ]
    install, *rest = commands.splitlines()
    assert install == "pip install numba_dequant"
    for line in rest:
        program, *arguments = line.split()
        assert program == "numba-dequant"
        assert main([*arguments, "--device", "reference"]) == 0  # the CPU would compile all formats
    assert "Every bit agrees" in capsys.readouterr().out


def texts():
    """Each text in the package, cut where something is inserted."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values).split("…")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield [node.value]


def is_printed(message, pieces):
    """Whether a text with these pieces, and anything between them, can be the message."""
    if sum(map(len, pieces)) < MOST_OF_A_MESSAGE or not message.startswith(pieces[0]):
        return False
    at = len(pieces[0])
    for piece in pieces[1:-1]:
        at = message.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return message == pieces[0] if len(pieces) == 1 else message[at:].endswith(pieces[-1])


MOST_OF_A_MESSAGE = 12
"""Text that is almost nothing but insertions would fit any message."""


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [line for language, block in blocks_of(text) if language == "text" for line in block.split("\n\n")]
    assert len(messages) > 20
    all_texts = list(texts())
    for message in messages:
        assert any(is_printed(message.strip(), pieces) for pieces in all_texts), f"no code prints: {message}"
    assert not any(is_printed("the GPU is too old for this package: …", pieces) for pieces in all_texts)


def variables_read():
    """Environment variables that the package reads: by a name, or by a constant with the name."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"(?:environ(?:\.get)?|getenv)[(\[]\s*([\w\"']+)", text):
            if name.strip("\"'") != name:
                yield name.strip("\"'")
            else:
                yield re.search(rf"^{name} = \"(\w+)\"", text, re.MULTILINE)[1]


def test_environment_variables_are_those_of_the_code():
    text = (DOCS / "environment-variables.md").read_text(encoding="utf-8")
    ours = text.partition("Programs beneath")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", ours, re.MULTILINE)) == set(variables_read())


def test_the_reference_has_every_public_name():
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    described = set(re.findall(r"^\.\. (?:py:)?\w+:: (\S+)$", text, re.MULTILINE))
    torch = ast.parse((PACKAGE / "torch" / "__init__.py").read_text(encoding="utf-8"))
    (torch_names,) = [
        ast.literal_eval(node.value)
        for node in torch.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ]
    public = {"numba_dequant": nd.__all__, "numba_dequant.torch": torch_names}
    public["numba_dequant.parallel"] = parallel.__all__
    assert {f"{module}.{name}" for module, names in public.items() for name in names} <= described


def anchors_of(text):
    """The anchors of the headings of a page."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.+)$", plain, re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        yield re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")


def links_of(text):
    plain = re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"\]\(([^()\s]+)\)", plain)
    yield from re.findall(r"(?:src|srcset)=\"([^\"]+)\"", plain)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_files_lead_somewhere(path):
    for link in links_of(path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:|\.\./\.\./actions/", link):  # another site, or the tests' page of this one
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor:
            assert anchor in set(anchors_of(file.read_text(encoding="utf-8"))), link


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import generate

    return generate


def test_a_page_of_a_format_has_what_the_code_and_the_results_say(generate):
    page = generate.format_page(nd.FORMATS["Q4_0"])
    assert "\n```\nx = d * (q - 8)\n```\n" in page
    assert "| `qs` | 2 to 17 | 16 x uint8 | 1 element |" in page
    assert "def decode(block: Any, at: int, run: int) -> Any:\n" in page
    assert "| values, where the floats of the block are 1 | -8 to 7 |" in page
    assert re.search(r"^\| FP16 by FP16 \| \S+ \| \d+% \|$", page, re.MULTILINE)
    assert re.search(r"^\| float16 \| \d+ \| \d+\.\d% \| \d+ \|$", page, re.MULTILINE)
    assert "differ from the original by 9.45% of their\nspread" in page
    assert "<svg" in page
    assert "prefers-color-scheme" not in page


def test_a_page_of_a_format_without_results_claims_nothing(generate):
    layout = formats.FORMATS["Q4_0"]
    new = nd.Format("NEW", 4000, 32, layout.layout, "nibbles", layout.dequantize, layout.decode)
    page = generate.format_page(new)
    assert "## Speed" not in page
    assert "## Rounding" in page
    assert "| way |" not in page
    assert "## What it loses" not in page


def test_links_and_pictures_fit_the_site(generate):
    def on_site(text, name):
        return generate.on_site(text, name).strip()

    assert on_site("[a](../SECURITY.md)", "cpu") == "[a](repository/security.md)"
    assert on_site("[a](docs/streams.md#x)", "repository/changelog") == "[a](../streams.md#x)"
    assert on_site("[a](../notebooks/02_one_kernel.ipynb)", "cpu") == "[a](notebooks/02_one_kernel.md)"
    assert on_site("[a](../tests/make_sample.py)", "cpu") == "a (`tests/make_sample.py`)"
    assert on_site("[a](https://example.org) [b](#c)", "cpu") == "[a](https://example.org) [b](#c)"
    assert on_site("![a](gallery/01_block_layouts-1.svg)", "gallery").startswith('<div class="block-picture"')
    picture = '<picture><source media="x" srcset="../dark.svg"><img alt="b" src="../light.svg"></picture>'
    assert on_site(picture, "cpu") == "![b](../light.svg){.only-light}\n\n![b](../dark.svg){.only-dark}"
    assert on_site("<!-- speed: written -->\ntext", "cpu") == "text"


class Links(HTMLParser):
    """What a page links to, its anchors, and its text on one line."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.anchors, self.texts = set(), set(), []
        self.feed(text)
        self.text = " ".join("".join(self.texts).split())

    def handle_data(self, data):
        self.texts.append(data)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.targets |= {found[name] for name in ("href", "src") if found.get(name)}
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}


MISSING = [package for package in ("sphinx", "furo", "myst_parser") if find_spec(package) is None]


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install '.[docs]'")
def test_the_site_is_built_without_a_warning_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "2", "-E", str(DOCS), str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("*.html")}
    for fmt in nd.FORMATS.values():
        page = pages.get(tmp_path / "formats" / f"{fmt.name.lower()}.html")
        assert (page is not None) == (fmt.block_size > 1)
        for paragraph in fmt.description.split("\n\n")[1:] if page else ():
            assert " ".join(paragraph.replace("`", "").split()) in page.text  # nothing was taken for Markdown
    for page in (tmp_path / "api").glob("*.html"):
        assert "**kwargs" not in page.read_text(encoding="utf-8"), f"{page.name} has a signature that is not ours"
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert file.exists(), f"{page.name}: {target}"
            if parts.fragment and file in pages:
                assert unquote(parts.fragment) in pages[file].anchors, f"{page.name}: {target}"
