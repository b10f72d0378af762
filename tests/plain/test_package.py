"""What is published: the wheel and its metadata, the changelog, and how to cite it."""

import datetime as dt
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest

import numba_dequant as nd

ROOT = Path(__file__).parents[2]
REPOSITORY, REF = "owner/name", "v1.2.3"
RELATIVE = re.compile(r'\]\((?!https://)[^)]*\)|(?:href|src|srcset)="(?!https://)')


@pytest.fixture
def release():
    """The module that prepares the source."""
    path = ROOT / ".github" / "release.py"
    if not path.exists():
        pytest.skip("it is not part of a source distribution")
    spec = importlib.util.spec_from_file_location("release", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheels(tmp_path, release):
    """Two wheels, built at different times from copies in different folders, and prepared as for PyPI."""
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("needs setuptools 77")
    command = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    found = []
    for name in ("first", "second"):
        copy = tmp_path / name
        copy.mkdir()
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, copy)
        for file, change in (("README.md", release.absolute_links), ("pyproject.toml", release.with_urls)):
            (copy / file).write_text(change((copy / file).read_text("utf-8"), REPOSITORY, REF), "utf-8")
        shutil.copytree(ROOT / "numba_dequant", copy / "numba_dequant", ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "numba_dequant" / "__init__.py").touch()
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
        out = subprocess.run(
            [sys.executable, "-c", command, copy],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not out.returncode, out.stderr
        found.append(copy / out.stdout.split()[-1])
    return found


def test_two_builds_are_equal_and_hold_the_package_alone(wheels):
    first, second = (sha256(wheel.read_bytes()).hexdigest() for wheel in wheels)
    assert first == second
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = set(wheel.namelist())
        (about,) = (wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
        size = sum(each.compress_size for each in wheel.infolist())
    assert size < 1_500_000
    assert not RELATIVE.search(about), "PyPI shows README outside of the repository"
    assert f"Project-URL: Issues, https://github.com/{REPOSITORY}/issues\n" in about
    tracked = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "numba_dequant").rglob("*") if path.suffix == ".py"
    }
    data = {"numba_dequant/py.typed", "numba_dequant/sample/sample.gguf"}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == tracked | data
    assert {name.partition("/")[2] for name in about} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
    }  # fmt: skip


def test_links_of_the_published_readme_are_those_of_the_repository(release):
    text = (ROOT / "README.md").read_text("utf-8")
    published = release.absolute_links(text, REPOSITORY, REF)
    assert not RELATIVE.search(published)
    assert RELATIVE.search(text)
    for name in ("test.yml", "test.yml/badge.svg"):
        assert f'="https://github.com/{REPOSITORY}/actions/workflows/{name}"' in published
    pages = re.findall(rf"https://github.com/{REPOSITORY}/blob/{REF}/([^)#]+)", published)
    pictures = re.findall(rf'https://raw.githubusercontent.com/{REPOSITORY}/{REF}/([^"]+)"', published)
    assert len(pages) > 20
    assert len(pictures) == 3
    for path in pages + pictures:
        assert (ROOT / path).is_file(), path
    assert release.absolute_links(published, REPOSITORY, REF) == published


def test_urls_are_added_once(release):
    tomllib = pytest.importorskip("tomllib")
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    changed = release.with_urls(text, REPOSITORY, REF)
    before, after = tomllib.loads(text), tomllib.loads(changed)
    urls = after["project"].pop("urls")
    assert after == before
    assert all(url.startswith(f"https://github.com/{REPOSITORY}") for url in urls.values())
    with pytest.raises(ValueError, match="already"):
        release.with_urls(changed, REPOSITORY, REF)


def test_the_version_is_ready_to_tag(release):
    assert release.problems(f"v{nd.__version__}") == []


@pytest.fixture
def ready(tmp_path):
    """A small repository whose version 3.4.5 is ready."""
    (tmp_path / "numba_dequant").mkdir()
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "changelog.d" / "README.md").touch()
    (tmp_path / "numba_dequant" / "version.py").write_text('VERSION = "3.4.5"\n')
    (tmp_path / "CHANGELOG.md").write_text("## 3.4.5 (2031-02-03)\n\n## 3.4.4 (2031-01-01)\n")
    (tmp_path / "CITATION.cff").write_text('version: 3.4.5\ndate-released: "2031-02-03"\n')
    return tmp_path


def test_nothing_is_to_be_done_for_a_version_that_is_ready(release, ready):
    assert release.problems("v3.4.5", ready) == []


@pytest.mark.parametrize(
    ("file", "text", "tag", "problem"),
    [
        ("numba_dequant/version.py", 'VERSION = "3.4.6"\n', "v3.4.5", "the tag is v3.4.5, and the version in"),
        ("numba_dequant/version.py", 'VERSION = "3.4.5"\n', "3.4.5", "the tag is 3.4.5, and the version in"),
        ("CHANGELOG.md", "## 3.4.4 (2031-01-01)\n", "v3.4.5", "CHANGELOG.md has no section of 3.4.5"),
        ("CHANGELOG.md", "## 3.4.5 (unreleased)\n", "v3.4.5", "CHANGELOG.md has no section of 3.4.5"),
        ("changelog.d/12.added.md", "More.\n", "v3.4.5", "changelog.d still has 12.added.md; run: towncrier build"),
        ("CITATION.cff", 'version: 3.4.4\ndate-released: "2031-02-03"\n', "v3.4.5", "in CITATION.cff are not those"),
        ("CITATION.cff", 'version: 3.4.5\ndate-released: "2031-01-01"\n', "v3.4.5", "in CITATION.cff are not those"),
    ],
)
def test_a_release_is_refused_that_is_not_ready(release, ready, file, text, tag, problem):
    (ready / file).write_text(text)
    assert problem in release.problems(tag, ready)[0]


def test_fragments_of_the_changelog_have_types_that_towncrier_knows():
    tomllib = pytest.importorskip("tomllib")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["towncrier"]
    types = [each["directory"] for each in config["type"]]
    changelog = (ROOT / config["filename"]).read_text("utf-8")
    assert changelog.count(config["start_string"]) == 1
    assert changelog.index(config["start_string"]) < changelog.index("\n## ")
    assert set(re.findall(r"^### (\w+)$", changelog, re.MULTILINE)) <= {each["name"] for each in config["type"]}
    for path in (ROOT / config["directory"]).iterdir():
        assert path.name == "README.md" or re.fullmatch(rf"(\d+|\+[\w-]+)\.({'|'.join(types)})\.md", path.name), path
    assert all(f"`{name}`" in (ROOT / config["directory"] / "README.md").read_text("utf-8") for name in types)


def test_how_to_cite_has_what_the_schema_requires():
    """CI validates the whole file by its schema."""
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["message"]
    assert cited["authors"][0]["name"] in (ROOT / "LICENSE").read_text("utf-8")
    assert (cited["title"], cited["version"], cited["license"]) == ("numba_dequant", nd.__version__, "MIT")
    assert dt.date.fromisoformat(cited["date-released"])


def test_installed_tests_do_not_see_the_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    import installed

    installed.copy_without_source(tmp_path)
    assert not (tmp_path / "numba_dequant").exists()
    assert (tmp_path / "tests" / "data" / "golden").is_dir()
    left_out = {path.name for path in (ROOT / "tests").rglob("test_*.py")} - {
        path.name for path in (tmp_path / "tests").rglob("test_*.py")
    }
    assert {"test_layers.py", "test_package.py"} <= left_out
    assert not left_out & {"test_readme.py", "test_formats.py", "test_install.py"}
