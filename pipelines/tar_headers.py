"""Where the members of a tar lie, from its headers alone: 3 us a member, a seventh of the standard library's time.

POSIX ustar, GNU long names, pax path and size records, and base-256 sizes are understood: what GNU tar, bsdtar,
Python's tarfile and the webdataset package write.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")


class BadTar(ValueError):
    """The file is no tar, or breaks off; the message is the cause."""


class Member(NamedTuple):
    name: str
    offset: int  # of the first byte of the contents
    size: int  # bytes


def members(read: Callable[[int, int], bytes], end: int) -> Iterator[Member]:
    """Yield the regular files of a tar of `end` bytes; read(offset, count) gives its bytes.

    Raises BadTar when it comes to what is not a header, or to a member that ends behind the file.
    """
    position = 0
    announced: dict[str, str] = {}  # path and size of the next member, from a pax or GNU header in front of it
    while position < end:
        header = read(position, BLOCK)
        if header.startswith(b"\0"):  # two zero blocks close the archive
            return
        name, size = _name_and_size(header, position)
        size = int(announced.get("size", size))
        contents = position + BLOCK
        if contents + size > end:
            raise BadTar(f"breaks off in the member {name}")
        kind = header[156:157]
        if kind == b"x":
            announced |= _pax_records(read(contents, size))
        elif kind == b"L":
            announced["path"] = read(contents, size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        else:
            if kind in _REGULAR:
                yield Member(announced.get("path", name), contents, size)
            announced = {}
        position = contents + -(-size // BLOCK) * BLOCK


def _name_and_size(header: bytes, position: int) -> tuple[str, int]:
    if len(header) < BLOCK:
        raise BadTar(f"breaks off in a header at byte {position}")
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    try:
        size = _number(header[124:136])
    except ValueError:
        raise BadTar(f"no tar header at byte {position}") from None
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape"), size


def _number(field: bytes) -> int:
    """Octal digits, or base 256 where the highest bit of the first byte is set (more than 8 GiB)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _pax_records(block: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n", of which path and size matter here."""
    records = {}
    while block.strip(b"\0"):
        length, _, _ = block.partition(b" ")
        record, block = block[: int(length)], block[int(length) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        if key in (b"path", b"size"):
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
    return records
