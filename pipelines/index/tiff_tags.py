"""The tags of a TIFF's first image (TIFF 6.0, section 2; BigTIFF as in libtiff), which are also how EXIF is written."""

import struct

WIDTH, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES, PLANAR = 256, 258, 259, 262, 274, 277, 284
COLOUR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT, SUBSAMPLING = 320, 338, 339, 530

_LETTERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # BYTE, SHORT, LONG, LONG8: the types of the tags above
_LONGEST = 16  # values; of longer tags (strip offsets, colour maps) only the first ones are read


def tags(encoded: bytes) -> dict[int, tuple[int, ...]]:
    """Number: values, of the tags that hold integers. Raises struct.error where the file ends before they do."""
    order = "<" if encoded[:2] == b"II" else ">"
    (version,) = struct.unpack_from(order + "H", encoded, 2)
    count_letter, word, head = ("Q", "Q", 8) if version == 43 else ("H", "I", 4)
    (start,) = struct.unpack_from(order + word, encoded, head)
    (count,) = struct.unpack_from(order + count_letter, encoded, start)
    first = start + struct.calcsize(order + count_letter)
    entry, room = struct.calcsize(order + "HH" + word + word), struct.calcsize(order + word)
    found = {}
    for position in range(first, first + entry * min(count, 4096), entry):
        number, kind, values = struct.unpack_from(order + "HH" + word, encoded, position)
        if letter := _LETTERS.get(kind):
            place = position + entry - room
            if values * struct.calcsize(letter) > room:
                (place,) = struct.unpack_from(order + word, encoded, place)
            found[number] = struct.unpack_from(f"{order}{min(values, _LONGEST)}{letter}", encoded, place)
    return found


def orientation(encoded: bytes) -> int:
    """As EXIF counts (1 is upright), 1 where nothing sensible is said."""
    try:
        (value, *_) = tags(encoded).get(ORIENTATION, (1,))
    except (struct.error, ValueError):
        return 1
    return value if 1 <= value <= 8 else 1
