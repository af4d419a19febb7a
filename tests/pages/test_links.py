"""The pages: relative links lead somewhere, and the map of files has every file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


def anchors(page):
    """The ids of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            there = (page.parent / target) if target else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(there), f"{page.name} links to {target}{anchor}"


def test_the_map_has_every_file_and_no_other():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("```\nl1ra/") : text.index("\nbenchmarks/")]
    folder, package, found = "", "", set()
    for line in tree.splitlines():
        if match := re.match(r"(l1ra|l1ra_kernels)/", line):
            package, folder = match[1], ""
        elif match := re.match(r"  (\w+)/", line):
            folder = match[1]
        elif line.startswith("  ") and not line.startswith("   "):
            folder = ""
        listed = re.match(r"[ ]+((?:\w+\.py(?:, | |$))+)", line)
        for name in re.findall(r"\w+\.py", listed[1]) if listed else ():
            found.add("/".join(part for part in (package, folder, name) if part))
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("l1ra", "l1ra_kernels")
        for path in (ROOT / package).rglob("*.py")
        if not path.name.startswith("__")
    }
    assert found == files
