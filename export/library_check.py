"""Loads a shared library in a process of its own, which a bad one may end, and tells what it cannot resolve.

usage: python -m gemma4.export.library_check LIBRARY [LIBRARY THAT STANDS IN FOR THE LOADER'S OWN FUNCTIONS]...

A compiled method calls functions of its loader as soon as it is loaded. The stand-ins offer such functions for that
moment; what they offer does not count as resolved. Writes one line of JSON: names of undefined symbols that neither the
library nor a library that it names has.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

from gemma4.export.elf import SharedLibrary


def unresolved(library: Path) -> list[str]:
    """Loads the library into this process. Raises OSError where that fails."""
    parsed = SharedLibrary.parse(memoryview(library.read_bytes()), library)
    # Functions of the loader may be absent here: they must not be looked up before they are called.
    loaded = ctypes.CDLL(str(library), mode=os.RTLD_LAZY | os.RTLD_LOCAL)
    # A name is looked up in a library and in all that it needs.
    return sorted(name for name in parsed.undefined if not _has(loaded, name.partition("@")[0]))


def _has(library: ctypes.CDLL, name: str) -> bool:
    try:
        library[name]
    except AttributeError:
        return False
    return True


def main() -> None:
    library, *stand_ins = map(Path, sys.argv[1:])
    for stand_in in stand_ins:
        ctypes.CDLL(str(stand_in), mode=os.RTLD_LAZY | os.RTLD_GLOBAL)
    sys.stdout.write(json.dumps(unresolved(library)) + "\n")


if __name__ == "__main__":
    main()
