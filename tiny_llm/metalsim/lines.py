"""From an address in compiled code to the line of the source, by the line table that clang leaves (DWARF 4).

Knows ELF files of 64 bits, which is what Linux loads.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_COPY, _ADVANCE_PC, _ADVANCE_LINE, _SET_FILE = 1, 2, 3, 4
_SET_COLUMN, _CONST_ADD_PC, _FIXED_ADVANCE_PC, _SET_ISA = 5, 8, 9, 12
_END_SEQUENCE, _SET_ADDRESS = 1, 2


class _Reader:
    """Numbers and names from bytes, one after another."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return int(value)

    def name(self) -> str:
        end = self.data.index(b"\0", self.at)
        found, self.at = self.data[self.at : end].decode(), end + 1
        return found

    def leb(self, *, signed: bool = False) -> int:
        value = shift = 0
        while True:
            byte = self.number("B")
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value - (1 << shift) if signed and byte & 0x40 else value


def find_line(library: Path, address: int) -> tuple[str, int] | None:
    """File and line of the instruction that holds ``address``, counted from the start of the library."""
    best: tuple[int, str, int] | None = None
    last: tuple[int, str, int] | None = None
    for row in _rows(_section(library.read_bytes(), b".debug_line")):
        if row and last:
            if last[0] <= address < row[0]:
                best = last
            if row[2] == 0:  # of no line, where clang made one of two: the one before is near
                row = (row[0], last[1], last[2])
        last = row
    return best[1:] if best else None


def _section(elf: bytes, name: bytes) -> bytes:
    (start,) = struct.unpack_from("<Q", elf, 40)  # e_shoff
    size, count, names = struct.unpack_from("<HHH", elf, 58)  # e_shentsize, e_shnum, e_shstrndx
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    strings = headers[names][4]
    for name_at, _, _, _, offset, length in headers:
        at = strings + name_at
        if elf[at : elf.index(b"\0", at)] == name:
            return elf[offset : offset + length]
    return b""


def _rows(table: bytes) -> Iterator[tuple[int, str, int] | None]:
    """Address, file and line of each row; None where a stretch of code ends."""
    reader = _Reader(table)
    while reader.at < len(table):
        length = reader.number("I")
        yield from _unit(_Reader(table[: reader.at + length], reader.at))
        reader.at += length


def _unit(r: _Reader) -> Iterator[tuple[int, str, int] | None]:
    assert r.number("H") == 4, "the line table is not of DWARF 4"
    program = r.number("I") + r.at
    step = r.number("B")
    r.at += 2
    base, width, opcodes = r.number("b"), r.number("B"), r.number("B")
    operands = [r.number("B") for _ in range(opcodes - 1)]
    while r.name():
        pass
    files = [""]
    while name := r.name():
        files.append(name.rpartition("/")[2])
        r.leb(), r.leb(), r.leb()
    r.at = program
    address, file, line = 0, 1, 1
    while r.at < len(r.data):
        code = r.number("B")
        if code >= opcodes:
            address += (code - opcodes) // width * step
            line += base + (code - opcodes) % width
            yield address, files[file], line
        elif code == 0:
            end = r.leb() + r.at
            kind = r.number("B")
            if kind == _SET_ADDRESS:
                address = r.number("Q")
            elif kind == _END_SEQUENCE:
                yield address, files[file], line
                yield None
                address, file, line = 0, 1, 1
            r.at = end
        elif code == _COPY:
            yield address, files[file], line
        elif code == _ADVANCE_PC:
            address += r.leb() * step
        elif code == _ADVANCE_LINE:
            line += r.leb(signed=True)
        elif code == _SET_FILE:
            file = r.leb()
        elif code == _CONST_ADD_PC:
            address += (255 - opcodes) // width * step
        elif code == _FIXED_ADVANCE_PC:
            address += r.number("H")
        else:
            for _ in range(operands[code - 1]):
                r.leb()
