"""The offsets and sizes of a tar's members. Python's tarfile reads the headers (ustar, GNU and pax names, sizes beyond
octal, sparse members). Added here: links are resolved, and after a damaged header, or after the end of an archive to
which others were appended, reading continues at the next header.
"""

import io
import os
import posixpath
import re
import tarfile
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
PADDING = 1 << 20  # bytes of zeros that may end an archive; more of them are missing data
CHUNK = 1 << 20  # bytes searched at a time
_MAGIC, _MAGIC_OFFSET = b"ustar", 257
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_LINKS = 40  # in a chain, as in Linux


class Member(NamedTuple):
    name: str
    offset: int  # of the first byte of the contents
    size: int  # bytes
    cause: str = ""  # why the contents cannot be read


class Damage(NamedTuple):
    cause: str
    lost_bytes: int | None  # skipped; None if they are missing beyond the end of the file


def read_members(file: BinaryIO) -> tuple[list[Member], list[Damage]]:
    """All members of a tar except folders, in order, and where the archive is damaged."""
    end = os.fstat(file.fileno()).st_size
    tar = tarfile.open(
        fileobj=io.BytesIO(bytes(2 * BLOCK))
    )  # an empty archive, so that opening reads nothing of the file
    tar.fileobj = file
    found: dict[int, Member | tarfile.TarInfo] = {}  # by position; links unresolved
    damages: list[Damage] = []
    position, closed = 0, False
    while position < end:
        info = _header(tar, position)
        if isinstance(info, tarfile.TarInfo):
            closed = False
            if not info.isdir():
                found[position] = info if info.islnk() or info.issym() else _member(info)
            if tar.offset > end and (info.offset_data + info.size > end or info.issparse()):
                found.pop(position, None)
                damages.append(Damage(f"breaks off in the member {info.name}; the members before it are used", None))
                return _resolved(list(found.values())), damages
            position = tar.offset
        else:
            closed = isinstance(info, tarfile.EOFHeaderError)
            position, damage = _resume(file, position, end, closed)
            damages += [damage] if damage else []
            closed |= damage is not None  # already reported
    if not closed:
        damages.append(Damage("ends without an end-of-archive marker" if end else "empty file", None))
    return _resolved(list(found.values())), damages


def _header(tar: tarfile.TarFile, position: int) -> tarfile.TarInfo | Exception:
    """The member at `position`, with tar.offset set to the next one; or why there is none."""
    tar.fileobj.seek(position)
    try:
        info = tarfile.TarInfo.fromtarfile(tar)
    except (tarfile.TarError, ValueError, RecursionError) as error:
        return error
    return info if tar.offset > position and info.size >= 0 else tarfile.InvalidHeaderError("negative size")


def _member(info: tarfile.TarInfo) -> Member:
    cause = ""
    if info.issparse():
        segments = [segment for segment in info.sparse if segment[1]]
        if segments != [(0, info.size)]:
            cause = "a sparse member, stored without its zeros: write the shard without --sparse"
    elif not info.isreg():
        cause = "not a regular file"
    return Member(info.name, info.offset_data, info.size, cause)


def _resume(file: BinaryIO, position: int, end: int, zeros: bool) -> tuple[int, Damage | None]:
    """Where to continue after a block that is not a header (`zeros`: the end of an archive), and the damage if any."""
    following = _next_header(file, position + 1, end)
    written = _find(file, re.compile(rb"[^\0]"), position, end) if zeros else position
    if written is None:
        return end, Damage(f"only zeros from byte {position} on", end - position) if end - position > PADDING else None
    if zeros and written == following:  # an archive appended to this one
        return following, None
    file.seek(position)
    start = file.read(BLOCK)
    compression = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
    if position == 0 and compression:
        return end, Damage(f"compressed ({compression}), which does not allow random access: decompress it", end)
    if following is None:
        cut = len(start) < BLOCK
        cause = f"breaks off in a header at byte {position}" if cut else f"no tar header at byte {position}"
        return end, Damage(cause, None if cut else end - position)
    cause = f"no tar header at byte {position}; the members from byte {following} on are used"
    return following, Damage(cause, following - position)


def _next_header(file: BinaryIO, position: int, end: int) -> int | None:
    """Position of the next header with a correct checksum: at any byte, because some may be missing before it."""
    magic = re.compile(_MAGIC)
    while (place := _find(file, magic, position + _MAGIC_OFFSET, end)) is not None:
        file.seek(place - _MAGIC_OFFSET)
        try:
            tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
            return place - _MAGIC_OFFSET
        except (tarfile.TarError, ValueError):
            position = place - _MAGIC_OFFSET + 1
    return None


def _find(file: BinaryIO, pattern: re.Pattern, position: int, end: int) -> int | None:
    """Position of the first match of `pattern` (up to BLOCK bytes) from `position` on."""
    while position < end:
        file.seek(position)
        if match := pattern.search(file.read(CHUNK + BLOCK)):
            return position + match.start()
        position += CHUNK
    return None


def _resolved(found: list[Member | tarfile.TarInfo]) -> list[Member]:
    """Links replaced by their targets in this archive."""
    # Members override links of the same name: GNU tar stores a file given twice as a link to itself.
    links_first = sorted(found, key=lambda entry: isinstance(entry, Member))
    by_name = {posixpath.normpath(entry.name): entry for entry in links_first}
    return [_target(entry, by_name) if isinstance(entry, tarfile.TarInfo) else entry for entry in found]


def _target(link: tarfile.TarInfo, by_name: dict[str, Member | tarfile.TarInfo]) -> Member:
    entry = link
    for _ in range(_LINKS):
        folder = posixpath.dirname(entry.name) if entry.issym() else ""
        entry = by_name.get(posixpath.normpath(posixpath.join(folder, entry.linkname)))
        if not isinstance(entry, tarfile.TarInfo):
            break
    if not isinstance(entry, Member):
        return Member(link.name, 0, 0, f"a link to {link.linkname}, which is not in this shard")
    return entry._replace(name=link.name)
