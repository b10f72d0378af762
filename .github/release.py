"""Prepare the source for the wheel that is published: `python .github/release.py`, in a workflow.

PyPI shows README outside of the repository, so its links become absolute, to the tag or the commit that is built. The
address of the repository is that of the workflow, and is written to `[project.urls]`. For a tag, it is an error if the
version, the changelog or CITATION.cff is not that of the tag.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SERVER, RAW = "https://github.com", "https://raw.githubusercontent.com"


def absolute_links(text: str, repository: str, ref: str) -> str:
    """The text of README with links and pictures that work on any page.

    Args:
        text: with links relative to the root of the repository. Those that begin with ``../../`` lead to its other
            pages on GitHub.
        repository: its owner and its name, as in "owner/name".
        ref: the tag or the commit.
    """

    def page(link: str, *, is_picture: bool) -> str:
        if link.startswith(("https://", "#")):
            return link
        if link.startswith("../../"):
            return f"{SERVER}/{repository}/{link.removeprefix('../../')}"
        return f"{RAW}/{repository}/{ref}/{link}" if is_picture else f"{SERVER}/{repository}/blob/{ref}/{link}"

    text = re.sub(r'(?<=\]\()[^)\s]+(?=\))|(?<=href=")[^"]+', lambda match: page(match[0], is_picture=False), text)
    return re.sub(r'(?<=src=")[^"]+|(?<=srcset=")[^"]+', lambda match: page(match[0], is_picture=True), text)


def with_urls(pyproject: str, repository: str, ref: str) -> str:
    """pyproject.toml with `[project.urls]`."""
    home = f"{SERVER}/{repository}"
    urls = {
        "Homepage": home,
        "Documentation": f"{home}/tree/{ref}/docs",
        "Changelog": f"{home}/blob/{ref}/CHANGELOG.md",
        "Issues": f"{home}/issues",
        "Security": f"{home}/security/policy",
    }
    lines = "\n".join(f'{name} = "{url}"' for name, url in urls.items())
    before, mark, after = pyproject.partition("[project.optional-dependencies]")
    if not mark or "\n[project.urls]" in pyproject:
        raise ValueError("pyproject.toml has no place for [project.urls], or has it already")
    return f"{before}[project.urls]\n{lines}\n\n{mark}{after}"


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What has to be done before the tag can be released."""

    def found_in(name: str, pattern: str) -> list[Any]:
        return re.findall(pattern, (root / name).read_text("utf-8"), re.MULTILINE)

    version = found_in("numba_dequant/version.py", r'^VERSION = "(.*)"$')
    if [tag.removeprefix("v")] != version or not tag.startswith("v"):
        return [f"the tag is {tag}, and the version in numba_dequant/version.py is {version[0]}"]
    found = []
    headings = found_in("CHANGELOG.md", rf"^## {re.escape(version[0])} \((\d{{4}}-\d{{2}}-\d{{2}})\)$")
    if len(headings) != 1:
        found.append(f"CHANGELOG.md has no section of {version[0]}; run: towncrier build --version {version[0]}")
    fragments = sorted(path.name for path in (root / "changelog.d").glob("*.md") if path.name != "README.md")
    if fragments:
        found.append(f"changelog.d still has {', '.join(fragments)}; run: towncrier build --version {version[0]}")
    cited = dict(found_in("CITATION.cff", r'^(version|date-released): "?([^"\n]*)"?$'))
    if cited != {"version": version[0], "date-released": (headings or [""])[0]}:
        found.append("version and date-released in CITATION.cff are not those of CHANGELOG.md")
    return found


def main() -> int:
    """Change README.md and pyproject.toml; the exit status is 1 if a tag is not ready."""
    repository, is_tag = os.environ["GITHUB_REPOSITORY"], os.environ["GITHUB_REF_TYPE"] == "tag"
    ref = os.environ["GITHUB_REF_NAME" if is_tag else "GITHUB_SHA"]
    found = problems(ref) if is_tag else []
    print(*found, sep="\n", file=sys.stderr)
    if found:
        return 1
    for name, change in (("README.md", absolute_links), ("pyproject.toml", with_urls)):
        path = ROOT / name
        path.write_text(change(path.read_text("utf-8"), repository, ref), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
