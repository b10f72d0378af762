"""Does the package work in the environments of its users? Writes docs/support.md.

    python tests/matrix.py            # all of it: 10 minutes, 4 GB of downloads
    python tests/matrix.py vllm oldest
    python tests/matrix.py --no-resolver

Needs `uv`, and Pythons of the versions below, which it looks for on the PATH and among those of uv and pyenv. Each
environment is made in a temporary folder, gets the package as a user would install it, and then runs `check` of this
file. No GPU is needed or used.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
GOLDEN = ROOT / "tests" / "data" / "golden"
DTYPES = ("float16", "bfloat16", "float32")
PACKAGES = ("numba", "llvmlite", "numpy", "ml-dtypes", "numba-cuda", "cuda-core")
CHECKS = ("import", "reference", "cpu", "native", "simulator", "ptx")


@dataclass(frozen=True)
class Environment:
    """What is installed together with the package, and with which of its extras."""

    python: str
    requirements: tuple[str, ...]
    extra: str = "[cu13]"
    without: dict[str, str] = field(default_factory=dict)
    """Checks that cannot succeed, and why."""


NO_GPU_PACKAGES = {"ptx": "numba-cuda is not installed"}
ENVIRONMENTS = {
    "oldest": Environment(
        "3.10",
        (
            "numba==0.60.0",
            "numpy==1.26.4",
            "ml_dtypes==0.4.0",
            "tqdm==4.66.0",
            "numba-cuda==0.22.2",
            "cuda-core==0.7.0",
        ),
    ),
    "Colab": Environment("3.12", ("numba==0.61.2", "numpy==2.1.3", "numba-cuda==0.22.2", "cuda-core==0.7.0"), "[cu12]"),
    "vLLM 0.33": Environment("3.12", ("numba==0.65.0", "numpy==2.4.*")),
    "SGLang 0.5.23": Environment("3.12", ("numba==0.65.1", "numpy==2.4.*")),
    "linker older than compiler": Environment(
        "3.12", ("numba==0.65.0", "numpy==2.3.*", "nvidia-nvvm==13.5.*", "nvidia-nvjitlink==13.0.*")
    ),
    "newest, Python 3.12": Environment("3.12", ("numpy>=2.5",)),
    "newest, Python 3.13": Environment("3.13", ("numpy>=2.5",)),
    "newest, CUDA 12": Environment("3.12", ("numpy>=2.5",), "[cu12]"),
    "no GPU packages": Environment("3.12", ("numpy>=2.5",), "", NO_GPU_PACKAGES),
    "no GPU packages, oldest": Environment("3.10", ("numba==0.60.0", "numpy==1.26.4"), "", NO_GPU_PACKAGES),
}

BESIDE = (
    "vllm==0.33.0",
    "sglang==0.5.23",
    "torch==2.13.0",
    "cudf-cu13==26.10.*",
    "cudf-cu12==26.10.*",
    "numpy==2.5.*",
)
"""What must keep all its versions when the package is installed with it, on Python 3.12."""

PLATFORMS = {
    "Linux x86_64": ("x86_64-manylinux_2_28", "cu13"),
    "Linux aarch64": ("aarch64-manylinux_2_28", "cu13"),
    "macOS 14 arm64": ("aarch64-apple-darwin", ""),
    "Windows x86_64": ("x86_64-pc-windows-msvc", ""),
    "Windows x86_64, cu13": ("x86_64-pc-windows-msvc", "cu13"),
}
PYTHONS = ("3.10", "3.12", "3.14")


# What runs in an environment. Nothing but the package and what it needs is installed there.


def check_import() -> str:
    before = set(sys.modules)  # some packages are imported by every Python that has them
    import numba_dequant as nd

    heavy = {"numba", "torch", "cupy", "cuda"} & (set(sys.modules) - before)
    if heavy:
        raise AssertionError(f"it imports {heavy}")
    return nd.__version__


def check_golden(device: str, most: int | None = None) -> str:
    import numpy as np

    import numba_dequant as nd
    from numba_dequant.dtypes import numpy_dtype

    paths = sorted(GOLDEN.glob("*.npz"))
    for path in paths:
        with np.load(path) as file:
            data, values = file["bytes"][:most], file["f32"][:most]
        for dtype in DTYPES:
            with np.errstate(all="ignore"):
                expected = values.astype(numpy_dtype(dtype))
            found = nd.dequantize(
                data, path.stem, dtype, shape=values.shape, device=device, out=np.empty_like(expected)
            )
            with np.errstate(all="ignore"):  # ml_dtypes warns of some NaNs
                is_right = np.isnan(expected) & np.isnan(found)
            is_right |= found.view(f"u{found.itemsize}") == expected.view(f"u{found.itemsize}")
            if not is_right.all():
                raise AssertionError(f"{path.stem} to {dtype}: {np.count_nonzero(~is_right)} values are wrong")
    return f"{3 * len(paths)} of {3 * len(paths)}"


def check_reference() -> str:
    return check_golden("reference")


def check_cpu() -> str:
    found = check_golden("cpu")
    # What has been compiled is on disk now, and needs no Numba.
    code = "import sys, numba_dequant as nd; nd.dequantize(bytes(34), 'Q8_0', device='cpu')"
    code += "; sys.exit('numba' in sys.modules)"
    if subprocess.run([sys.executable, "-c", code], check=False).returncode:
        raise AssertionError("the compiled code was not kept")
    return found


def check_native() -> str:
    import ctypes

    import numpy as np

    from numba_dequant.kernels import native
    from numba_dequant.kernels.native.records import strings_dtype

    data = np.frombuffer((3).to_bytes(8, "little") + b"abc" + (0).to_bytes(8, "little"), np.uint8)
    strings = np.array([(data.ctypes.data, data.size, 0, 2)], strings_dtype)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(native.load("walk_strings").value)(strings.ctypes.data)
    if (strings["at"][0], strings["left"][0]) != (data.size, 0):
        raise AssertionError(f"walk_strings: {strings}")
    for name in ("read_and_send", "join_threads"):
        native.load(name)
    return "3 of 3"


def check_simulator() -> str:
    return check_golden("cuda", 8)


def check_ptx() -> str:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from ptx_rules import faults

    import numba_dequant as nd
    from numba_dequant.kernels import compiler

    formats = [source for source in nd.FORMATS.values() if source.decode]
    kernels = [compiler.dequantize_kernel(source, DTYPES[number % 3]) for number, source in enumerate(formats)]
    kernels.append(compiler.batch_kernel(nd.FORMATS["Q4_K"], "float16"))
    for kernel in kernels:
        text = compiler.ptx(kernel, (9, 0))
        found = faults(text)
        if not compiler.assemble(text, (9, 0)).startswith(b"\x7fELF"):
            found.append("no machine code")
        if found:
            raise AssertionError(f"{kernel.label}: {', '.join(found)}")
    return f"{len(kernels)} of {len(kernels)}"


def check(name: str) -> None:
    """Run one check here, and print its result as JSON."""
    import warnings

    warnings.simplefilter("error", RuntimeWarning)  # that nothing can be kept on disk is one
    try:
        print(json.dumps({"is_right": True, "text": globals()[f"check_{name}"]()}))
    except BaseException as error:
        print(json.dumps({"is_right": False, "text": f"{type(error).__name__}: {error}".splitlines()[0][:160]}))


# What runs outside.


def uv(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).parent / "uv"
    command = str(beside) if beside.exists() else shutil.which("uv")
    if command is None:
        sys.exit("matrix.py needs uv: pip install uv")
    return subprocess.run(
        [command, "--no-progress", *arguments], input=given, capture_output=True, text=True, check=False
    )


def python_of(version: str) -> str:
    """A Python of that version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return found
    return version  # uv finds its own, or says that there is none


def run_environment(environment: Environment, folder: Path) -> tuple[dict[str, str], dict[str, dict[str, object]]]:
    """The versions that are installed, and the result of each check."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    made = uv("venv", "--python", python_of(environment.python), str(folder))
    wanted = (f"numba_dequant{environment.extra} @ {ROOT.as_uri()}", *environment.requirements)
    installed = uv("pip", "install", "--python", str(python), *wanted)
    failed = [each for each in (made, installed) if each.returncode]
    if failed:
        problem = failed[0].stderr
        return {}, {"import": {"is_right": False, "text": problem.strip().splitlines()[-1][:160]}}
    versions = {each["name"]: each["version"] for each in json.loads(
        uv("pip", "list", "--python", str(python), "--format", "json").stdout)}  # fmt: skip
    results = {}
    for name in CHECKS:
        if name in environment.without:
            results[name] = {"is_right": True, "text": f"not run, {environment.without[name]}"}
            continue
        settings = {"NUMBA_DEQUANT_CACHE_DIR": str(folder / "compiled"), "PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
        if name == "simulator":
            settings["NUMBA_ENABLE_CUDASIM"] = "1"
        found = subprocess.run(
            [str(python), str(Path(__file__).resolve()), "--check", name],
            cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False,
        )  # fmt: skip
        last = found.stdout.strip().splitlines()[-1:] or [""]
        if not last[0].startswith("{"):
            last = [json.dumps({"is_right": False, "text": f"exit status {found.returncode}: {found.stderr[-160:]}"})]
        results[name] = json.loads(last[0])
        print(f"  {name}: {results[name]['text']}", flush=True)
    return versions, results


def pins(text: str) -> dict[str, str]:
    """Names and versions of a list of requirements."""
    return dict(re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([^\s;]+)", text, re.MULTILINE))


def resolve(
    requirements: str, *options: str, python: str = "3.12", extra: str | None = None
) -> tuple[dict[str, str], str]:
    """What a resolver takes, and its complaint; with the package if there is an `extra`, which may be empty."""
    arguments = ["pip", "compile", "--no-header", "--no-annotate", "--python-version", python, *options, "-"]
    if extra is not None:
        arguments += [str(ROOT / "pyproject.toml"), *(["--extra", extra] if extra else [])]
    found = uv(*arguments, given=requirements)
    complaint = " ".join(found.stderr.split())[:300] if found.returncode else ""
    return pins(found.stdout), complaint


SHOWN = ("numba", "numpy", "numba-cuda", "cuda-core")


def beside_rows() -> list[list[str]]:
    rows = []
    for requirement in BESIDE:
        extra = "cu12" if "cu12" in requirement else "cu13"
        alone, problem = resolve(requirement)
        together, refused = resolve(requirement, extra=extra)
        if problem or refused:
            rows.append([requirement, extra, "", "", f"**no solution**: {problem or refused}"])
            continue
        both = [(name, version, together.get(name)) for name, version in alone.items()]
        changed = [f"{name} {before} -> {after}" for name, before, after in both if before != after]
        added = [f"{name} {together[name]}" for name in SHOWN if name not in alone]
        kept = [f"{name} {alone[name]}" for name in SHOWN if name in alone]
        verdict = f"**changed: {', '.join(changed)}**" if changed else f"{len(alone)} versions kept"
        rows.append([requirement, extra, ", ".join(kept), ", ".join(added), verdict])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def platform_rows() -> list[list[str]]:
    rows = []
    for title, (name, extra) in PLATFORMS.items():
        row = [title, f"`[{extra}]`" if extra else ""]
        for python in PYTHONS:
            options = ("--only-binary", ":all:", "--python-platform", name)
            found, problem = resolve("", *options, python=python, extra=extra)
            row.append(f"**{problem}**" if problem else f"numba {found['numba']}, numpy {found['numpy']}")
        rows.append(row)
        print(*row, sep=" | ", flush=True)
    return rows


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def section(name: str, text: str, page: str) -> str:
    """The page with another text between the marks of a section, if it has such marks."""
    marks = f"<!-- {name}: written by tests/matrix.py -->", f"<!-- /{name} -->"
    start, end = page.index(marks[0]) + len(marks[0]), page.index(marks[1])
    return f"{page[:start]}\n\n{text}\n\n{page[end:]}"


def machine() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        processor = (re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE) or [platform.machine()])[0]
    except OSError:
        processor = platform.processor() or platform.machine()
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    return f"{today}, {platform.system()} {platform.machine()}, {processor}, no GPU."


def main() -> int:
    """Write the page; the exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"environments: {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--no-resolver", action="store_true", help="leave out what is resolved and not installed")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check:
        check(options.check)
        return 0
    chosen = {name: ENVIRONMENTS[name] for name in options.names} or ENVIRONMENTS
    page, is_right, rows = PAGE.read_text(encoding="utf-8"), True, []
    for name, environment in chosen.items():
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            versions, results = run_environment(environment, Path(folder) / "environment")
        is_right &= all(result["is_right"] for result in results.values())
        shown = [str(results[each]["text"]) if each in results else "" for each in CHECKS[1:]]
        first = "ok" if results["import"]["is_right"] else f"**{results['import']['text']}**"
        rows.append([name, environment.python, *(versions.get(each, "") for each in PACKAGES), first, *shown])
    if chosen is ENVIRONMENTS:
        head = ("environment", "Python", *PACKAGES, "import", "reference", "CPU", "native code", "simulator", "PTX")
        page = section("environments", f"{table(head, rows)}\n\n{machine()}", page)
        PAGE.write_text(page, encoding="utf-8")
    if not options.no_resolver:
        beside, platforms = beside_rows(), platform_rows()
        is_right &= "**" not in str(beside) + str(platforms)
        text = table(("beside", "extra", "has", "gets", "result"), beside)
        page = section("beside", text, page)
        text = table(("platform", "extra", *(f"Python {each}" for each in PYTHONS)), platforms)
        today, version = machine().partition(",")[0], " ".join(uv("--version").stdout.split()[:2])
        page = section("platforms", f"{text}\n\n{today}, {version}.", page)
        PAGE.write_text(page, encoding="utf-8")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
