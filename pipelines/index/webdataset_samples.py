"""Which members of a tar make up a sample: an image and its label, by their names.

7.jpg 7.cls             a sample; 7.json may hold the label, too
v1.5.jpg v1.5.cls       a sample as well: keys hold dots, as file names do
7.left.jpg 7.cls        and so is this, for webdataset ends a key at its first dot
7.jpg 7.cls 7.mask.png  the mask is a further image of the sample: counted and passed over
7.jpg 7.cls 7.jpg 7.cls the key comes twice: two samples
7.jpg 7.png 7.cls       either may be the image: the first is, and the other is named as bad
7.cls                   the image is missing: named as bad
"""

import posixpath
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .folder import EXTENSIONS, passed_over
from .tar_members import Member

_LABELS = (".cls", ".json")  # in this order
Parts = dict[str, Member]  # members of one name by their endings: ".jpg", ".cls"


class Found(NamedTuple):
    """An image, or the label of one that is missing; `cause` says why there is no sample."""

    member: Member
    label: Member | None
    cause: str = ""


def pair(members: Iterable[Member]) -> tuple[list[Found], int]:
    """(images with their labels, the number of further images)"""
    named = _by_name(members)
    further = {_field(name, named) for name, groups in named.items() if _is_field_of_an_image(name, groups, named)}
    found: list[Found] = []
    passed, taken = 0, set()  # taken: by an image of a longer name
    for name, groups in named.items():
        for number, parts in enumerate(groups):
            if not (images := _images(parts)):
                continue
            first, *others = images
            label = _label(parts)
            key = None if label else _key(name, named)
            if key is not None:
                place = (key, min(number, len(named[key]) - 1))
                if _field(name, named) in further or _images(named[key][place[1]]):
                    passed += len(images)
                    continue
                label = None if place in taken else _label(named[key][place[1]])
                again = place in taken
                taken.add(place)
            else:
                again = label is None and any(map(_images, groups[:number]))
            cause = _second(key or name) if again else "no label: neither .cls nor .json with 'label'"
            found.append(Found(first, label, "" if label else cause))
            found += [Found(other, None, _second(name)) for other in others]
    found += [Found(label, label, "no image of this name") for label in _without_image(named, taken)]
    return found, passed


def _by_name(members: Iterable[Member]) -> dict[str, list[Parts]]:
    """Members by their name without the ending; of each a new group begins where a sample is complete, or repeats."""
    named: dict[str, list[Parts]] = {}
    for member in members:
        path = posixpath.normpath(member.name)
        if any(passed_over(part) for part in path.split("/") if part != ".."):
            continue
        name, ending = posixpath.splitext(path)
        groups = named.setdefault(name, [{}])
        ending = ending.lower()
        complete = ending in EXTENSIONS and _label(groups[-1]) and _images(groups[-1])
        if ending in groups[-1] or complete:
            groups.append({})
        groups[-1][ending] = member
    return named


def _images(parts: Parts) -> list[Member]:
    return [member for ending, member in parts.items() if ending in EXTENSIONS]


def _label(parts: Parts) -> Member | None:
    return next((parts[ending] for ending in _LABELS if ending in parts), None)


def _key(name: str, named: dict[str, list[Parts]]) -> str | None:
    """The longest part of a name, up to one of its dots, that is the name of an image or a label, too."""
    folder, slash, base = name.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        if any(_images(parts) or _label(parts) for parts in named.get(folder + slash + base, ())):
            return folder + slash + base
    return None


def _field(name: str, named: dict[str, list[Parts]]) -> str:
    """mask, of 7.mask"""
    return name.removeprefix(_key(name, named) or name)


def _is_field_of_an_image(name: str, groups: list[Parts], named: dict[str, list[Parts]]) -> bool:
    if not _images(groups[0]) or _label(groups[0]):
        return False
    key = _key(name, named)
    return key is not None and any(map(_images, named[key]))


def _second(key: str) -> str:
    return f"a second image under the key {posixpath.basename(key)}, which is to have one"


def _without_image(named: dict[str, list[Parts]], taken: set[tuple[str, int]]) -> Iterator[Member]:
    for name, groups in named.items():
        for number, parts in enumerate(groups):
            if not _images(parts) and (name, number) not in taken and (label := _label(parts)):
                yield label
