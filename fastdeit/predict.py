"""The most probable classes of images.

    python -m fastdeit.predict RUN photo.jpg photos/ 'archive/**/*.jpg'
    python -m fastdeit.predict RUN photos/ --csv --top 3 > classes.csv
    python -m fastdeit.predict FILE.pth --model MODEL photos/ --json
    python -m fastdeit.predict deit_small_patch16_224 photos/
    python -m fastdeit.predict RUN photos/ --attention maps/

Predictions come in the order of the images, a batch at a time; a file that is given twice is predicted once. What
cannot be read is named on stderr and skipped: the exit code is 2 only if nothing could be read. As in training, EXIF
rotation is not applied.
"""

import csv
import glob
import io
import json
import logging
import os
import shutil
import stat
import sys
from collections import ChainMap, Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from fastdeit.cli import parse
from fastdeit.config import Size, setting
from fastdeit.errors import UserError, run
from fastdeit.pipelines import IMAGE_EXTENSIONS, list_files

IMAGE_WIDTH, CLASS_WIDTH = 60, 16  # columns of the plain form; a longer name pushes the rest of its line to the right


ON_ONE_LINE = str.maketrans({"\n": "\\n", "\r": "\\r"})  # a file's name may hold anything


class Prediction(NamedTuple):
    image: str  # as it was named or found
    classes: list[tuple[str, float]]  # (name, probability), the most probable first; none if it could not be read
    error: str | None = None  # why it could not be read

    @property
    def label(self) -> str | None:
        """The most probable class; None if the image could not be read."""
        return self.classes[0][0] if self.classes else None


# Each form gives a line, or None where it has none for an image that could not be read.


def as_line(
    images: Sequence[str], classes: Sequence[str], width: int | None = None
) -> Callable[[Prediction], str | None]:
    """The plain form, its columns as wide as these names of images and classes ask for.

    width: the longest line that is wanted; classes behind the first give way to it
    """
    image_width = min(max(map(len, images)), IMAGE_WIDTH)
    class_width = min(max(map(len, classes)), CLASS_WIDTH)

    def form(prediction: Prediction) -> str | None:
        if prediction.error is not None:
            return None
        cells = [f"{name:<{class_width}} {100 * p:5.1f} %" for name, p in prediction.classes]
        line, *others = [f"{prediction.image.translate(ON_ONE_LINE):<{image_width}}  {cells[0]}", *cells[1:]]
        for cell in others:
            if width is not None and len(line) + 2 + len(cell) > width:
                break
            line += f"  {cell}"
        return line

    return form


def as_json(prediction: Prediction) -> str:
    """{"image": ..., "classes": [{"class": ..., "probability": ...}, ...]} or {"image": ..., "error": ...}"""
    if prediction.error is not None:
        return json.dumps({"image": prediction.image, "error": prediction.error})
    classes = [{"class": name, "probability": _rounded(p)} for name, p in prediction.classes]
    return json.dumps({"image": prediction.image, "classes": classes})


def csv_header(top: int) -> str:
    return _csv_line(["image", *(f"{column}_{i}" for i in range(1, top + 1) for column in ("class", "probability"))])


def as_csv(prediction: Prediction) -> str | None:
    if prediction.error is not None:
        return None
    return _csv_line([prediction.image, *(cell for name, p in prediction.classes for cell in (name, _rounded(p)))])


def _csv_line(cells: Sequence) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


def _rounded(probability: float) -> float:
    """To six significant digits, which is about the precision of float32."""
    return float(f"{probability:.6g}")


def image_files(arguments: Sequence[str]) -> list[str]:
    """The files that the arguments name, in their order, each once, at its first mention.

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
        others = [match for match in matches if os.path.splitext(match)[1].lower() in IMAGE_EXTENSIONS]
        found = sorted({*others, *list_files(folders).files} - {*folders})
        otherwise = "the pattern matches " + ("no images" if matches else "nothing")
    else:
        return [argument]
    if not found:
        raise UserError(f"{argument}: {otherwise}; looked for {', '.join(sorted(IMAGE_EXTENSIONS))}")
    return found


TOP = 5  # classes


def main() -> None:
    import tyro

    @dataclass(kw_only=True)
    class Predict:
        checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
        """A run's folder, or last or best in it; a folder of timm or transformers; a file or URL of weights (with
        --model); hf-hub:ORG/NAME; timm's name of a model, for its published weights."""
        images: Annotated[
            tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...", help_behavior_hint="")
        ]
        """Files; folders, which are searched with all below them, and patterns such as 'photos/**/*.jpg', which give
        the files with an image's extension, sorted."""
        top: int | None = setting(None, at_least=1)
        """Classes to show. None: 5, or as many of them as fit on a line of the terminal."""
        head: Literal["cls", "dist", "both"] = "both"
        """Class head, distillation head, or the average of their logits."""
        ema: bool = False
        """Use the moving average of the weights."""
        attention: Path | None = None
        """Folder for a picture of each image: where each token looks in the last block, and its attention rollout."""
        json: bool = False
        """One JSON object per line: {"image": ..., "classes": [{"class": ..., "probability": ...}, ...]}, or
        {"image": ..., "error": ...} for one that cannot be read."""
        csv: bool = False
        """A header and a row for each image: image, class_1, probability_1, class_2, ..."""
        model: str | None = None
        """The model a file of weights is of: deit_*, deit3_*, or any other timm model name."""
        pretrained: bool = False
        """CHECKPOINT is timm's name of a model, even if there is a file of that name."""
        batch_size: int = setting(64, at_least=1)
        """Images per step."""
        input_size: Size | None = setting(None, at_least=1)
        """Height and width of the images in pixels, one number for squares; position embeddings are interpolated. None:
        the checkpoint's."""
        eval_crop_ratio: float | None = setting(None, above=0, at_most=1)
        """Side of the centre crop over that of the resized image (crop_pct in timm). None: the checkpoint's."""
        precision: Literal["fp32", "bf16", "fp16"] | None = None
        """Type of the weights and activations. None: fp16 on CUDA, fp32 on the CPU."""
        device: str | None = None
        """cuda, cuda:N or cpu. None: cuda where present."""

    arguments = parse(Predict, prog="python -m fastdeit.predict", description=__doc__)

    from fastdeit.distributed.world import join
    from fastdeit.models.inference import load
    from fastdeit.models.loading import has_moving_average

    if arguments.json and arguments.csv:
        raise UserError("--json and --csv are two formats of the same output: choose one")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("predict is one process: start it with python, not with torchrun")
    files = image_files(arguments.images)
    pictures = None if arguments.attention is None else _picture_paths(files, arguments.attention)
    if arguments.ema and not has_moving_average(arguments.checkpoint, pretrained=arguments.pretrained):
        raise UserError(f"{arguments.checkpoint} holds no moving average of the weights: omit --ema")
    with join(arguments.device) as world:
        classifier = load(
            arguments.checkpoint, device=world.device, weights="ema" if arguments.ema else "model",
            input_size=arguments.input_size, name=arguments.model, pretrained=arguments.pretrained,
            precision=arguments.precision, crop_pct=arguments.eval_crop_ratio,
        )  # fmt: skip
        predictions = predict(
            classifier, files, world, top=arguments.top or TOP, head=arguments.head,
            batch_size=arguments.batch_size, pictures=pictures,
        )  # fmt: skip
        form, header = _form(arguments, files, classifier.class_names)
        for note in classifier.notes:
            print(note, file=sys.stderr)
        some = _print(predictions, header, form, len(files))
    if not some:
        raise UserError("no image could be read")


def _form(arguments, files: Sequence[str], classes: Sequence[str]) -> tuple[Callable, str | None]:
    """(what formats a prediction as a line, the header line or None)"""
    if arguments.json:
        return as_json, None
    if arguments.csv:
        return as_csv, csv_header(min(arguments.top or TOP, len(classes)))
    to_fit = arguments.top is None and sys.stdout.isatty()
    return as_line(files, classes, shutil.get_terminal_size().columns if to_fit else None), None


def predict(
    classifier,
    files: Sequence[str],
    world,
    *,
    top: int = TOP,
    head: str = "both",
    batch_size: int = 64,
    pictures: dict[str, Path] | None = None,
) -> Iterator[list[Prediction]]:
    """The predictions for `files`, in their order, a batch at a time.

    classifier: from inference.load. files: names, each once. top: classes to name, or as many as there are. head: see
    Classifier.probabilities. pictures: where the attention to each file is drawn; None for nowhere.

    Raises UserError for a head the model does not have, and for pictures of a model whose attention is not known.
    """
    if pictures is not None:
        _refuse_other_models(classifier.model)
    classes = classifier.class_names
    missing = {file: "there is no such file" for file in files if not os.path.exists(file)}
    loader, errors = _loader(classifier, [file for file in files if file not in missing], batch_size, world)
    errors, waiting = ChainMap(missing, errors), deque(files)
    for step, batch in enumerate(_batches(loader)):
        images = classifier.prepare(batch)
        best = classifier.probabilities(images, head).topk(min(top, len(classes)), dim=1)
        predictions = {
            loader.index.name(i): [(classes[label], value) for label, value in zip(labels, values)]
            for i, labels, values in zip(batch.indices.tolist(), best.indices.tolist(), best.values.tolist())
            if i >= 0
        }
        if pictures is not None and predictions:
            _draw(classifier, images[(batch.indices >= 0).to(images.device)], predictions, pictures)
        last = loader.index.name(min((step + 1) * batch_size, len(loader.index)) - 1)
        done = [waiting.popleft()]
        while done[-1] != last:
            done.append(waiting.popleft())
        yield [Prediction(name, predictions.get(name, []), errors.get(name)) for name in done]
    yield [Prediction(name, [], errors[name]) for name in waiting]


def _loader(classifier, files: list[str], batch_size: int, world) -> tuple:
    """(batches of the files, causes by name of those that cannot be read, to which decoding adds); no batches, None,
    where no file looks like an image."""
    from fastdeit.pipelines import NoImages

    if not files:
        return None, {}
    try:
        loader = classifier.files_loader(files, batch_size, world)
    except NoImages as none:
        return None, {bad.name: bad.cause for bad in none.bad}
    return loader, loader.bad_files.causes


def _batches(loader) -> Iterator:
    from fastdeit.pipelines import NoImages

    try:
        yield from loader or ()
    except NoImages:  # every single one turned out to be damaged, which bad_files has noted
        return


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the attention


def _picture_paths(files: Sequence[str], folder: Path) -> dict[str, Path]:
    """A PNG for each file, below `folder` as the files are below the folder they have in common: cat/1.png for
    cat/1.jpg, or cat/1.jpg.png where there is a cat/1.png, too."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--attention {folder}: there is a file of this name; choose another folder")
    absolute = [os.path.abspath(file) for file in files]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = [os.path.relpath(path, common) for path in absolute]
    stems = [os.path.splitext(name)[0] for name in names]
    times = Counter([*names, *stems])
    pictures = {
        file: folder / f"{stem if times[stem] == 1 else name}.png" for file, name, stem in zip(files, names, stems)
    }
    overwritten = {os.path.abspath(path) for path in pictures.values()} & set(absolute)
    if overwritten:
        raise UserError(
            f"--attention {folder}: the picture {min(overwritten)} is one of the images, too; choose another folder"
        )
    return pictures


def _refuse_other_models(model) -> None:
    from fastdeit.models.deit import DeiT

    if not isinstance(model, DeiT):
        raise UserError(
            f"--attention: where a {type(model).__name__} of timm's looks is not known here, only that of DeiT and "
            "DeiT III; omit the flag"
        )


def _draw(classifier, images, predictions: dict[str, list], pictures: dict[str, Path]) -> None:
    from fastdeit.models.attention_maps import draw_attention

    paths = [pictures[name] for name in predictions]
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--attention: {path.parent} cannot be made: {error.strerror}") from error
    captions = [f"{classes[0][0][:28]}\n{100 * classes[0][1]:.1f} %" for classes in predictions.values()]
    draw_attention(classifier.model, images, classifier.mean, classifier.std, paths, captions)


def _print(predictions: Iterator[list[Prediction]], header: str | None, form: Callable, total: int) -> bool:
    """Predictions to stdout, images that cannot be read to stderr; whether there was a prediction at all."""
    logging.getLogger("fastdeit.pipelines.bad_files").addHandler(logging.NullHandler())  # they are named here
    sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8 come out as they are
    some = False
    with _progress(total) as (say, advance):
        for batch in predictions:
            for prediction in batch:
                if header is not None:
                    print(header)
                    header = None
                if prediction.error is not None:
                    say(f"{prediction.image.translate(ON_ONE_LINE)}: {prediction.error}")
                if (line := form(prediction)) is not None:
                    print(line)
                some |= prediction.error is None
            sys.stdout.flush()
            advance(len(batch))
    return some


@contextmanager
def _progress(total: int):
    """(say, advance): a bar on stderr where that is a terminal and stdout is a file; what goes into a pipe may come
    back to the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    console, to_file = Console(stderr=True), stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False,
        disable=not (console.is_terminal and to_file),
    )  # fmt: skip
    task = bar.add_task("", total=total)
    with bar:
        yield lambda text: console.print(Text(text), soft_wrap=True), lambda count: bar.advance(task, count)


if __name__ == "__main__":
    run(main)
