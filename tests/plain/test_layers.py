"""Who imports whom: as the tables under "Where things are" in CONTRIBUTING.md say, and no other way."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "numba_dequant"
SECTION = "CONTRIBUTING.md, 'Where things are'"
EXCEPTIONS = {("format", "explain/")}
"""Imports upwards, inside functions, which the text below the first table names."""


def row_of(module, rows):
    """The key among `rows` that stands for a module, such as `backends/reference`: its own, or else its folder's."""
    folder = f"{module.partition('/')[0]}/"
    return module if module in rows else folder if folder in rows else None


class Contract:
    """What the tables say."""

    def __init__(self, text):
        section = text.partition("## Where things are\n")[2].partition("\n## ")[0]
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"
        ]
        layers = [row for row in rows if len(row) == 4][2:]
        packages = [row for row in rows if len(row) == 2][2:]
        assert layers, f"no table of layers in {SECTION}"
        assert packages, f"no table of packages in {SECTION}"
        self.layer_of, self.allowed = {}, {}
        for layer, modules, _, below in layers:
            named = {name.strip() for name in below.split(",") if name.strip()}
            unknown = named - set(self.allowed)
            assert not unknown, f"{SECTION}: the row of {layer} names {unknown}, which is no row above it"
            self.allowed[layer] = named
            for module in re.findall(r"`([\w/]+)`", modules):
                assert module not in self.layer_of, f"{SECTION}: `{module}` stands in two rows"
                self.layer_of[module] = layer
        self.owners = {re.findall(r"`([\w.]+)`", name)[0]: re.findall(r"`([\w/]+)`", who) for name, who in packages}

    def problem(self, module, target, place):
        """What is wrong with this import, in a sentence that says what to do; None if it is allowed."""
        if target.split(".")[0] == PACKAGE.name:
            return self._problem_of_ours(module, module_of(target), place)
        top = target.split(".")[0]
        if top in sys.stdlib_module_names or top == "numpy":
            return None
        package = max((name for name in self.owners if f"{target}.".startswith(f"{name}.")), key=len, default=None)
        if package is not None and row_of(module, self.owners[package]):
            return None
        return (
            f"{place} imports {target}, and {SECTION}, gives `{package or top}` to "
            f"{', '.join(self.owners.get(package, [])) or 'nobody'}: add `{module}` to its row, or drop the import"
        )

    def _problem_of_ours(self, module, other, place):
        ours, theirs = (self.layer_of.get(row_of(each, self.layer_of)) for each in (module, other))
        if ours is None:
            return f"{place}: add `{module}` to a row of {SECTION}"
        if theirs is None:
            return f"{place} imports {other}: add `{other}` to a row of {SECTION}"
        if ours == theirs or theirs in self.allowed[ours] or (module, f"{other.partition('/')[0]}/") in EXCEPTIONS:
            return None
        return (
            f"{place} imports {other}, of the layer {theirs!r}: add {theirs!r} to the last column of the row "
            f"{ours!r} of {SECTION}, or drop the import"
        )


def module_of(target):
    """The module of ours that a dotted name lies in, as the tables name it: `bits`, or `backends/cpu`."""
    first, second = [*target.split("."), "", ""][1:3]
    if (PACKAGE / first).is_dir() and first:
        return f"{first}/{second}"
    return first if (PACKAGE / f"{first}.py").exists() else "__init__"


def imports(source, package):
    """The dotted names that a source file of `package` imports, anywhere in it, and the lines where it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [each.value for each in node.args[:1] if isinstance(each, ast.Constant)]
        else:
            continue
        for name in names:
            yield name, node.lineno


def problems(contract, path, source):
    place = path.relative_to(PACKAGE)
    module = "/".join([*place.parts[:1], Path(place.parts[1]).stem] if len(place.parts) > 1 else [place.stem])
    package = ".".join([PACKAGE.name, *place.parts[:-1]])
    for name, line in imports(source, package):
        yield contract.problem(module, name, f"numba_dequant/{place.as_posix()}:{line}")


@pytest.fixture(scope="module")
def contract():
    return Contract((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_every_module_has_its_row(contract):
    required = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    required |= {path.stem for path in PACKAGE.glob("*.py")}
    there = required | {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.glob("*/*.py")}
    missing, gone = required - set(contract.layer_of), set(contract.layer_of) - there
    assert not missing, f"add {sorted(missing)} to a row of {SECTION}"
    assert not gone, f"drop {sorted(gone)} from {SECTION}: there are no such modules"
    gone = {module for owners in contract.owners.values() for module in owners} - there
    assert not gone, f"drop {sorted(gone)} from the table of packages of {SECTION}: there are no such modules"


def test_modules_import_what_they_may(contract):
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        found += filter(None, problems(contract, path, path.read_text(encoding="utf-8")))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        (
            "bits.py",
            "import numba_dequant.backends.cpu",
            "imports backends/cpu, of the layer 'backends': add 'backends'",
        ),
        ("bits.py", "def f():\n    from numba_dequant.backends import gpu", "bits.py:2 imports backends/gpu"),
        ("kernels/copy.py", "from numba_dequant.backends.reference import dequantize", "imports backends/reference"),
        ("backends/reference.py", "from numba_dequant import kernels", "imports kernels"),
        ("formats/q4_0.py", "from ..backends import cpu", "imports backends/cpu"),
        ("formats/q4_0.py", "from ..model import Model", "imports model"),
        ("gguf/file.py", "from numba_dequant.explain import trace", "imports explain/trace, of the layer 'explain'"),
        (
            "kernels/compiler.py",
            "from numba import cuda",
            "gives `numba.cuda` to kernels/numba_cuda, kernels/intrinsics_cuda: add `kernels/compiler` to its row",
        ),
        ("backends/cpu.py", "import numba.cuda.dispatcher", "gives `numba.cuda`"),
        ("gguf/file.py", "import numba", "gives `numba` to"),
        ("interop.py", "import torch", "gives `torch` to torch/, integrations/: add `interop` to its row"),
        ("interop.py", "importlib.import_module('cupy')", "gives `cupy` to nobody"),
        ("api.py", "from cuda.core import Device", "gives `cuda` to"),
        ("brand_new.py", "from numba_dequant import bits", "add `brand_new` to a row"),
    ],
)
def test_an_import_that_breaks_the_tables_is_found(contract, path, source, message):
    [problem] = problems(contract, PACKAGE / path, source)
    assert message in problem


@pytest.mark.parametrize("source", ["import os", "import numpy as np", "from numba_dequant.bits import RUN", "f(1)"])
def test_an_import_that_keeps_to_the_tables_is_fine(contract, source):
    assert not any(problems(contract, PACKAGE / "backends" / "cpu.py", source))


EXCEPTIONS_OF_ROOMS = {("format", "explain"), ("format", "formats"), ("device", "runtime"), ("device", "compiler")}
"""Imports upwards, within functions; the last two are those of the time when all modules lay in the root."""


def structure():
    """Modules and folders, imports from one to another, and lines of code outside of the formats."""
    rooms, arrows, lines = set(), set(), 0
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        room = place.parts[0] if len(place.parts) > 1 else place.stem
        source = path.read_text(encoding="utf-8")
        rooms.add(room)
        lines += 0 if room == "formats" else len(source.splitlines())
        package = ".".join([PACKAGE.name, *place.parts[:-1]])
        for name, _ in imports(source, package):
            other = module_of(name).partition("/")[0]
            if name.split(".")[0] == PACKAGE.name and other not in (room, "__init__"):
                arrows.add((room, other))
    arrows -= EXCEPTIONS_OF_ROOMS

    def floor(room):
        return 1 + max((floor(other) for user, other in arrows if user == room), default=0)

    in_root = len(list(PACKAGE.glob("*.py")))
    floors = max(map(floor, rooms))
    return {"in the root": in_root, "rooms": len(rooms), "floors": floors, "arrows": len(arrows), "lines": lines}


if __name__ == "__main__":
    print(structure())
