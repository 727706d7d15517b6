"""Which image files a command line means: files, folders and patterns."""

import glob
import os
from collections.abc import Sequence

from fastdeit.pipelines.folder import EXTENSIONS, list_files

from .command import UserError


def image_files(arguments: Sequence[str]) -> list[str]:
    """The files that are meant, in the order of the arguments, each once, where it comes first.

    A folder, or a pattern such as "photos/**/*.jpg" that no shell has expanded, gives the files with an image's
    extension, sorted; a pattern those below the folders it matches too. Any other name is taken as it is, whatever its
    extension, and whether or not there is such a file.

    Raises UserError for no arguments, and for a folder or a pattern without images.
    """
    if not arguments:
        raise UserError("give at least one image: a file, a folder or a pattern")
    files: dict[str, str] = {}  # by absolute path
    for argument in arguments:
        for file in _meant_by(argument):
            files.setdefault(os.path.abspath(file), file)
    return list(files.values())


def _meant_by(argument: str) -> list[str]:
    if os.path.isdir(argument):
        found, otherwise = list_files([argument]).files, "the folder holds no images"
    elif glob.has_magic(argument) and not os.path.lexists(argument):
        matches = sorted(glob.glob(os.path.expanduser(argument), recursive=True))
        folders = [match for match in matches if os.path.isdir(match)]
        others = [match for match in matches if os.path.splitext(match)[1].lower() in EXTENSIONS]
        found = sorted({*others, *list_files(folders).files} - {*folders})
        otherwise = "the pattern matches " + ("no images" if matches else "nothing")
    else:
        return [argument]
    if not found:
        raise UserError(f"{argument}: {otherwise}; looked for {', '.join(sorted(EXTENSIONS))}")
    return found
