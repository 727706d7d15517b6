"""What lies where in a tar: as Python's tarfile has it, and on where that stops."""

import io
import os
import tarfile

import pytest

from fastdeit.pipelines.index.tar_members import BLOCK, PADDING, Damage, Member, read_members


def archive(contents: dict[str, bytes], format=tarfile.GNU_FORMAT, change=lambda info: info) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(change(info), io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture
def read(tmp_path):
    def read(contents: bytes):
        (tmp_path / "x.tar").write_bytes(contents)
        with open(tmp_path / "x.tar", "rb") as file:
            members, damages = read_members(file)
            found = {m.name: contents[m.offset : m.offset + m.size] for m in members if not m.cause}
        return members, damages, found

    return read


FILES = {f"{i}.jpg": bytes([65 + i]) * (400 * i + 7) for i in range(5)}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_contents(read, format):
    names = ["a.jpg", "deep/" * 25 + "b.jpg", "c" * 99 + "d"]
    if format != tarfile.USTAR_FORMAT:
        names += ["e" * 180 + ".jpg", "é/ü.jpg"]
    files = {name: os.urandom(i * 300) for i, name in enumerate(names)}
    _, damages, found = read(archive(files, format))
    assert found == files and damages == []


def test_a_size_beyond_octal(tmp_path):
    header = bytearray(archive({"x": b""})[:BLOCK])
    header[124:136] = b"\x80" + (9 << 30).to_bytes(11, "big")
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(checked(header))
        file.truncate(2 * BLOCK + (9 << 30))
    with open(tmp_path / "x.tar", "rb") as file:
        assert read_members(file)[0] == [Member("x", BLOCK, 9 << 30)]


def checked(header: bytearray) -> bytes:
    """With the checksum that its bytes ask for."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_links_lead_to_what_they_mean(read):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo("./a/0.jpg")
        info.size = 5
        for name, kind, target in [
            ("b/early.jpg", tarfile.SYMTYPE, "../a/hard.jpg"),
            (None, None, None),
            ("a/hard.jpg", tarfile.LNKTYPE, "./a/0.jpg"),
            ("lost.jpg", tarfile.SYMTYPE, "nowhere.jpg"),
            ("loop.jpg", tarfile.SYMTYPE, "loop.jpg"),
            ("pipe.jpg", tarfile.FIFOTYPE, ""),
            ("folder", tarfile.DIRTYPE, ""),
        ]:
            if name is None:
                tar.addfile(info, io.BytesIO(b"image"))
                continue
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    members, damages, found = read(stream.getvalue())
    assert found == {"b/early.jpg": b"image", "./a/0.jpg": b"image", "a/hard.jpg": b"image"} and damages == []
    assert {m.name: m.cause for m in members if m.cause} == {
        "lost.jpg": "a link to nowhere.jpg, which is not in this shard",
        "loop.jpg": "a link to loop.jpg, which is not in this shard",
        "pipe.jpg": "not a regular file",
    }


def sparse(segments: list[tuple[int, int]], size: int) -> bytes:
    """A member that GNU tar stored as sparse."""
    stored = sum(count for _, count in segments)
    header = bytearray(archive({"s.jpg": bytes(stored)})[:BLOCK])
    header[156:157] = b"S"
    for i, numbers in enumerate(segments):
        header[386 + 24 * i : 410 + 24 * i] = b"%011o\0%011o\0" % numbers
    header[483:495] = b"%011o\0" % size
    return checked(header) + b"s" * (-(-stored // BLOCK) * BLOCK)


def test_sparse_members(read):
    rest = archive({"after.jpg": b"after"})
    members, damages, found = read(sparse([(0, 1024)], 1024) + rest)
    assert found == {"s.jpg": b"s" * 1024, "after.jpg": b"after"} and damages == []
    members, damages, found = read(sparse([(512, 1024)], 4096) + rest)
    assert found == {"after.jpg": b"after"} and damages == []
    assert members[0].cause.startswith("a sparse member, stored without its zeros")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("damage", ["byte", "block", "zeros", "removed"])
def test_members_after_a_damaged_header(read, format, damage):
    files = {name.replace(".", "é" * 60 + "."): data for name, data in FILES.items()}
    contents = bytearray(archive(files, format))
    with tarfile.open(fileobj=io.BytesIO(contents)) as tar:
        place, following = (info.offset for info in tar.getmembers()[2:4])
    if damage == "byte":
        contents[place] ^= 1
    elif damage == "block":
        contents[place : place + BLOCK] = os.urandom(BLOCK)
    elif damage == "zeros":
        contents[place : place + BLOCK] = bytes(BLOCK)
    else:
        del contents[place + 100 : place + 333]
        following -= 233
    _, damages, found = read(bytes(contents))
    assert {name: data for name, data in found.items() if data in FILES.values()}.keys() >= files.keys() - {
        list(files)[2]
    }
    assert len(damages) == 1 and "the members from byte " in damages[0].cause
    assert 0 < damages[0].lost_bytes <= following - place + BLOCK


def test_archives_appended_to_one_another(read):
    first, second = archive({"a.jpg": b"a"}), archive({"b.jpg": b"b"})
    _, damages, found = read(first + second)
    assert found == {"a.jpg": b"a", "b.jpg": b"b"} and damages == []


def test_an_archive_cut_anywhere_says_so(read):
    whole = archive(FILES)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = {info.name: info.offset_data + info.size for info in tar}
        last = tar.offset
    for length in range(0, last + 1, 97):
        _, damages, found = read(whole[:length])
        assert found == {name: data for name, data in FILES.items() if ends[name] <= length}
        assert len(damages) == 1 and damages[0].lost_bytes is None, length
    assert read(whole[: last + BLOCK])[1] == []


def test_an_archive_whose_end_never_arrived(read):
    whole = archive(FILES)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        third = tar.getmembers()[3].offset
    _, damages, found = read(whole[:third] + bytes(PADDING + 5000))
    assert len(found) == 3 and damages == [Damage(f"only zeros from byte {third} on", PADDING + 5000)]


@pytest.mark.parametrize(
    "contents, cause",
    [
        (b"x" * 5000, "no tar header at byte 0"),
        (b"", "empty file"),
        (b"\x1f\x8b" + bytes(5000), "compressed (gzip), which does not allow random access: decompress it"),
        (b"\x28\xb5\x2f\xfd" + bytes(5000), "compressed (zstd), which does not allow random access: decompress it"),
    ],
)
def test_what_is_no_tar_says_so(read, contents, cause):
    members, damages, _ = read(contents)
    assert members == [] and [damage.cause for damage in damages] == [cause]


def test_a_header_of_negative_size_ends(read):
    header = bytearray(archive({"x": b""})[:BLOCK])
    header[124:136] = b"\xff" * 11 + b"\x00"
    _, damages, found = read(checked(header) + archive({"a.jpg": b"a"}))
    assert found == {"a.jpg": b"a"} and len(damages) == 1
