"""The engines that we compare with, each in an environment of its own, made from PyPI.

    python benchmarks/peers.py                  says which there are
    python benchmarks/peers.py make             makes all that are missing (llama.cpp and ik_llama.cpp are
                                                compiled: minutes, and llama.cpp's server: more)
    python benchmarks/peers.py make llamacpp    makes one anew

A peer that cannot be made is reported with its reason, here and by every benchmark that wants it.
Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from argparse import RawDescriptionHelpFormatter
from contextlib import suppress
from pathlib import Path

from measure import llama_server
from measure.environments import PEERS, PeerMissing, default_folder, make, python_of

NAMES = (*PEERS, llama_server.NAME)


def state(name: str, folder: Path) -> str | None:
    """None where a peer is ready, else the reason."""
    try:
        if name == llama_server.NAME:
            llama_server.binary_of(folder)
        else:
            python_of(name, folder)
    except PeerMissing as missing:
        return str(missing)
    return None


def main() -> None:
    """Make what is asked for; then say what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("list", "make"), default="list")
    parser.add_argument(
        "names", nargs="*", metavar="peer", help=f"of {', '.join(NAMES)}; none: all that miss"
    )
    parser.add_argument("--folder", type=Path, default=default_folder())
    options = parser.parse_args()
    for name in options.names:
        if name not in NAMES:
            parser.error(f"there is no peer {name!r}; there are {', '.join(NAMES)}")
    if options.what == "make":
        for name in options.names or [name for name in NAMES if state(name, options.folder)]:
            print(f"making {name} ...", flush=True)
            with suppress(PeerMissing):  # said below, with its reason
                if name == llama_server.NAME:
                    llama_server.make(options.folder)
                else:
                    make(name, options.folder)
    reasons = {name: state(name, options.folder) for name in NAMES}
    for name, reason in reasons.items():
        print(f"{name:<14}{reason or 'ready'}")
    print(json.dumps({"benchmark": "peers", "folder": str(options.folder), "missing": reasons}))


if __name__ == "__main__":
    main()
