"""The book as built: it loads nothing from elsewhere; and what is taken from npm is checked first."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from book.course.manifest import ROOT, read_manifest
from book.course.workbook import Workbook, in_parts, whole

BOOK = ROOT / "book"
SITE = BOOK / "site"
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
REMOTE = re.compile(r"(?:[a-z]+:)?//", re.I)


@pytest.fixture(scope="module")
def site() -> Path:
    """The built site."""
    if not (SITE / "index.html").is_file():
        pytest.skip("the book is not built; `make book` does it, with npm")
    return SITE


def script(name: str) -> ModuleType:
    """book/name.py, as a module."""
    spec = importlib.util.spec_from_file_location(name, BOOK / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loads(HTMLParser):
    """What a browser fetches for a page, as far as its elements say."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element loads; a link to click loads nothing."""
        values = dict(attrs)
        wanted = (
            "href"
            if tag == "link" and values.get("rel") not in ("canonical", "prev", "next")
            else LOADS.get(tag)
        )
        if wanted and (value := values.get(wanted)):
            self.found.append(value)


def loaded(path: Path) -> Iterator[str]:
    """What a page or a style sheet of the site loads."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".html":
        parser = Loads()
        parser.feed(text)
        yield from parser.found
    yield from re.findall(r"""url\(\s*["']?([^"')]+)""", text)
    yield from re.findall(r"""@import\s+["']([^"']+)""", text)


def test_the_built_book_loads_nothing_remote(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".svg")]
    found = [(path, target) for path in files for target in loaded(path)]
    remote = [f"{path.relative_to(site)}: {target}" for path, target in found if REMOTE.match(target)]
    assert not remote, remote
    for path, target in found:
        local = target.partition("#")[0].partition("?")[0]
        if not local or local.startswith("data:") or path.name == "404.html":
            continue
        older = local.endswith((".woff", ".ttf"))  # for browsers that lack woff2
        assert older or (path.parent / local).is_file(), f"{path}: {target} is not there"


def test_every_page_is_in_the_site_and_found_by_search(site: Path) -> None:
    index = (site / "search.json").read_text(encoding="utf-8")
    for page in (BOOK / "docs").rglob("*.md"):
        html = page.relative_to(BOOK / "docs").with_suffix(".html")
        assert (site / html).is_file(), f"{page} is not in the nav of book/mkdocs.yml"
        assert html.as_posix() in index or html.as_posix() == "index.html"


def test_what_the_theme_would_fetch_is_there_before(site: Path) -> None:
    """Its script brings mermaid and the search's shim from a CDN, unless a page has them by then."""
    page = (site / "week1" / "attention.html").read_text(encoding="utf-8")
    assert "vendor/iframe-worker/shim/index.js" in page and "vendor/katex/katex.min.js" in page
    assert (site / "vendor" / "mermaid" / "mermaid.min.js").is_file()
    assert "vendor/mermaid/mermaid.min.js" in (site / "book.js").read_text(encoding="utf-8")


def test_a_mistake_changes_one_place_of_what_is_taught(tmp_path: Path) -> None:
    """What book/chapters says of the code, seen in two seconds: the gates see it too, but take minutes."""
    for chapter in read_manifest().values():
        Workbook(tmp_path / chapter.id).fill(chapter.teaches)
        texts = {definition: whole(*in_parts(definition)) for definition in chapter.teaches}
        for mutant in chapter.mutants:
            assert texts[mutant.definition].count(mutant.old) == 1, f"{chapter.id} {mutant.name}"


def test_without_npm_it_says_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / "book" / "vendor.py"
    script.parent.mkdir()
    for name in ("vendor.py", "vendor.toml"):
        (script.parent / name).write_text((BOOK / name).read_text())
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "apt install npm" in done.stderr and "Traceback" not in done.stderr


def test_a_package_is_its_hash(tmp_path: Path) -> None:
    vendor = script("vendor")
    archive = tmp_path / "it.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("package/dist/it.js")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"it;"))
    wrong = vendor.Package("it", "1", "sha512-AAAA", ["dist/*.js"])
    with pytest.raises(vendor.VendorError, match=r"it 1 is sha512-.*, expected sha512-AAAA") as caught:
        vendor.unpack(wrong, archive, tmp_path / "out")
    right = wrong._replace(integrity=re.search(r"is (sha512-\S+),", str(caught.value))[1])  # type: ignore[index]
    vendor.unpack(right, archive, tmp_path / "out")
    assert (tmp_path / "out" / "it" / "it.js").read_bytes() == b"it;"
    with pytest.raises(vendor.VendorError, match="has no file"):
        vendor.unpack(right._replace(files=["gone"]), archive, tmp_path / "out")


def test_requirements_are_pinned_and_hashed() -> None:
    text = (BOOK / "requirements.txt").read_text(encoding="utf-8")
    packages = re.split(r"^(?=[a-z])", text, flags=re.M)[1:]
    assert "zensical==0.0.73 " in text and all("==" in it and "--hash=sha256:" in it for it in packages)


def test_experiments_are_put_into_their_pages() -> None:
    head, tail = (
        "Text\n\n```sh\npython book/experiments/it.py --fast  # why\n```\n\n```text\n",
        "```\n\nMore\n",
    )
    other = "```sh\npython main.py\n```\n\n```text\nleft\n```\n"
    asked = []

    def run(command: str, name: str) -> str:
        asked.append((command, name))
        return "new\n\nrows\n"

    page = script("regenerate").regenerated(head + "old\n" + tail + other, run)
    assert page == head + "new\n\nrows\n" + tail + other
    assert asked == [("book/experiments/it.py --fast  # why", "it")]


@pytest.mark.parametrize("page", sorted((BOOK / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_every_experiment_on_a_page_can_be_made_anew(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = script("regenerate").EXPERIMENT.findall(text)
    assert len(found) == text.count("\npython book/experiments/") + text.count("\npython benchmarks/"), (
        "a sh block of one line, then a text block"
    )
