"""Takes what pages need in a browser from npm, checks it, and puts it into book/docs/vendor (not in git).

Owns book/vendor.toml: packages, versions, hashes, files. Does nothing where they are there already. Which
registry npm asks is npm's own setting.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

BOOK = Path(__file__).resolve().parent
FOLDER = BOOK / "docs" / "vendor"
STAMP = "made-of.toml"
NO_NPM = """The pages need KaTeX, mermaid and iframe-worker, which npm brings when the book is built, and
there is no npm here. Install it (Debian, Ubuntu: apt install npm; macOS: brew install node), then try again.
The pages can be read without: they are Markdown, in book/docs."""


class VendorError(RuntimeError):
    """A package cannot be had, or is not what it should be."""


class Package(NamedTuple):
    """``integrity`` is npm's: "sha512-" and the hash in base64. ``files`` are patterns of paths in it."""

    name: str
    version: str
    integrity: str
    files: Sequence[str]


def read_packages(path: Path) -> list[Package]:
    """The packages of a vendor.toml."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Package(name, row["version"], row["integrity"], row["files"]) for name, row in rows.items()]


def fetch(package: Package, folder: Path) -> Path:
    """Let npm download a package's archive into ``folder``. Raises VendorError with npm's reason."""
    npm = shutil.which("npm")
    if npm is None:
        raise VendorError(NO_NPM)
    wanted = f"{package.name}@{package.version}"
    command = [npm, "pack", wanted, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise VendorError(f"npm could not bring {wanted}:\n{done.stderr.strip()}")
    return folder / done.stdout.strip().splitlines()[-1]


def unpack(package: Package, archive: Path, target: Path) -> None:
    """Put a package's wanted files into ``target``/name. Raises VendorError unless the hash is right."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.integrity:
        raise VendorError(f"{package.name} {package.version} is {found}, expected {package.integrity}.")
    with tarfile.open(archive) as tar:
        members = {m.name.partition("/")[2]: m for m in tar.getmembers() if m.isfile()}
        for pattern in package.files:
            names = [name for name in members if fnmatch(name, pattern)]
            if not names:
                raise VendorError(f"{package.name} {package.version} has no file {pattern}.")
            for name in names:
                content = tar.extractfile(members[name])
                assert content is not None, "only files are listed"
                place = target / package.name / name.removeprefix("dist/")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content.read())


def make(manifest: Path, target: Path) -> bool:
    """Fill ``target``, and return whether there was something to do. Raises VendorError."""
    wanted, stamp = manifest.read_text(encoding="utf-8"), target / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return False
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        for package in read_packages(manifest):
            unpack(package, fetch(package, Path(folder)), target)
    stamp.write_text(wanted, encoding="utf-8")
    return True


def main() -> int:
    """Fill the folder; an error is a few lines."""
    try:
        if make(BOOK / "vendor.toml", FOLDER):
            print(f"{FOLDER.relative_to(BOOK.parent)}: made")
    except VendorError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
