"""Which of the teacher's classes correspond to the data's: the same ones, or those listed in a file.

    dogs_and_cats.json   {"cat": ["n02123045", "n02123159", 283], "dog": "golden retriever"}
    classes.txt          one class of the teacher per line, in the order of the data's sorted class folders: where these
                         have the teacher's names (ImageNet's are n01440764, ...), `ls DIR/train > classes.txt`

A class is given by its name, where the teacher's names are known, or by its index.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from fastdeit.errors import UserError
from fastdeit.pipelines import class_name


class SelectClasses(nn.Module):
    """(batch, teacher's classes) logits to (batch, data's classes).

    groups: the teacher's classes for each of the data's. The probabilities of several are added: a logsumexp of logits.
    """

    def __init__(self, groups: Sequence[Sequence[int]], teacher_classes: int):
        super().__init__()
        widest = max(map(len, groups))
        # Shorter groups are padded with a class of probability 0, whose index is one beyond the teacher's last.
        rows = [[*group, *[teacher_classes] * (widest - len(group))] for group in groups]
        self.register_buffer("groups", torch.tensor(rows))

    def forward(self, logits: Tensor) -> Tensor:
        if self.groups.shape[1] == 1:
            return logits[:, self.groups[:, 0]]
        return F.pad(logits.float(), (0, 1), value=-torch.inf)[:, self.groups].logsumexp(-1)


def same_classes(teacher: str, names: Sequence[str] | None, count: int, classes: Sequence[str]) -> None:
    """Raise UserError unless the teacher's classes are the data's: by name, or by count where it has no names."""
    if names is not None and tuple(map(class_name, names)) == tuple(classes):
        return
    if names is None and count == len(classes):
        return
    theirs = f"{count} classes" if names is None else _few(names)
    raise UserError(
        f"the teacher {teacher} has {theirs}, the data has {_few(classes)}: map its classes to the data's by "
        "--teacher-classes FILE, or fit a teacher on this data with `python -m fastdeit.teach fit --data-path DIR "
        "--model NAME`"
    )


def read_groups(path: str | Path, classes: Sequence[str], names: Sequence[str] | None, count: int) -> list[list[int]]:
    """The teacher's classes for each of the data's `classes`, from the file of --teacher-classes.

    names: the teacher's, where they are known; count: how many it has. Raises UserError for a file that omits a class
    of the data, or names a class that either side does not have.
    """
    entries = _entries(Path(path), classes)
    known = _places(names, count)
    groups = []
    for name, entry in zip(classes, entries):
        members = entry if isinstance(entry, list) else [entry]
        if not members:
            raise UserError(f"--teacher-classes {path}: the class {name} has no class of the teacher")
        groups.append([_place(member, known, count, path) for member in members])
    seen: dict[int, str] = {}
    for name, group in zip(classes, groups):
        for place in group:
            if seen.setdefault(place, name) != name or group.count(place) > 1:
                raise UserError(
                    f"--teacher-classes {path}: class {place} of the teacher is mapped to both {seen[place]} and "
                    f"{name}: map it to one of them"
                )
    return groups


def _entries(path: Path, classes: Sequence[str]) -> list:
    """The file's entry for each class of the data, in their order."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--teacher-classes {path}: cannot be read ({error}): give a JSON file or a text file"
        ) from error
    if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "["):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(f"--teacher-classes {path}: is not valid JSON ({error})") from error
    else:
        content = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(content, dict):
        content = {class_name(name): entry for name, entry in content.items()}
        if missing := [name for name in classes if name not in content]:
            raise UserError(f"--teacher-classes {path}: lacks the data's {_few(missing)}")
        if unknown := [name for name in content if name not in classes]:
            raise UserError(f"--teacher-classes {path}: has {_few(unknown)}, which the data does not have")
        return [content[name] for name in classes]
    if not isinstance(content, list) or len(content) != len(classes):
        found = f"{len(content)} entries" if isinstance(content, list) else "no list"
        raise UserError(f"--teacher-classes {path}: has {found}, the data has {_few(classes)}: give one entry for each")
    return content


def _places(names: Sequence[str] | None, count: int) -> dict[str, int]:
    """The teacher's classes by name. Where only their number is known, and it is that of an ImageNet subset, they are
    its WordNet synsets (n01440764) and their words (tench), unless another class has the same word."""
    if names is not None:
        return {name: place for place, name in enumerate(names)}
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return {}
    info = ImageNetInfo(subset)
    words = [{word.strip() for word in info.index_to_description(place).split(",")} for place in range(count)]
    frequency = Counter(word for some in words for word in some)
    places = {word: place for place, some in enumerate(words) for word in some if frequency[word] == 1}
    return places | {name: place for place, name in enumerate(info.label_names())}


def _place(member, known: dict[str, int], count: int, path) -> int:
    if isinstance(member, str) and member in known:
        return known[member]
    try:
        place = int(member)
    except (TypeError, ValueError):
        hint = "by its index" if not known else f"by its index, or by a name such as {next(reversed(known))}"
        raise UserError(f"--teacher-classes {path}: the teacher has no class {member!r}; give one {hint}") from None
    if not 0 <= place < count:
        raise UserError(f"--teacher-classes {path}: the teacher has no class {place}; its {count} are 0 to {count - 1}")
    return place


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} class{'es' * (len(names) != 1)} ({shown})"
