"""The teacher: frozen, in evaluation mode, as cheap as it can be made without changing its predictions.

BatchNorms are folded, weights are half precision on a GPU, the layout is the fastest (layouts.py), and torch.compile
assumes static shapes. How often the result agrees with the float32 teacher is measured on training views when a run
starts. There is no int8 or fp8: no measurement here shows what they would gain.
"""

import copy
import hashlib
from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.config import Config, Distillation, Size, height_width, in_pixels
from fastdeit.data import PRECISIONS, compiles, precision_of
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.models import sources
from fastdeit.models.loading import LoadedModel, load_model
from fastdeit.tuning import Tuner

from . import layouts
from .class_map import SelectClasses, read_groups, same_classes
from .folding import fold_batchnorm
from .patches import logits_of

ENOUGH = 0.99  # agreement with float32 below which there is a warning


class Teacher:
    """The student's normalised images to `(batch, classes)` logits over the data's classes, with no gradient graph.

    groups: the teacher's classes for each of the data's (class_map.read_groups), None where they are the same
    """

    def __init__(
        self, loaded: LoadedModel, *, student_mean, student_std, device, dtype=torch.float32,
        groups: Sequence[Sequence[int]] | None = None,
    ):  # fmt: skip
        self.name, self.input_size, self.dtype = loaded.name, loaded.input_size, dtype
        self.notes = [f"the teacher {loaded.name}: {note}" for note in loaded.notes]
        self.device, self.fingerprint = torch.device(device), _fingerprint(loaded, groups)
        plain = loaded.model.eval().requires_grad_(False)
        self.in_chans = loaded.in_chans
        if self.in_chans == 1 and len(student_mean) == 3:
            raise UserError(
                f"the teacher {self.name} is for grey images, of one channel, and the student's have 3: give "
                "--in-chans 1, or another teacher"
            )
        example = _noise(self.in_chans, loaded.input_size)
        try:
            folded, self.folded = fold_batchnorm(plain, example)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"the teacher {self.name} does not accept images of {in_pixels(loaded.input_size)} pixels ({error}): "
                "change --teacher-input-size"
            ) from error

        def network(model: nn.Module, dtype: torch.dtype) -> "_Network":
            select = None if groups is None else SelectClasses(groups, loaded.num_classes)
            made = _Network(model.to(dtype), dtype, loaded, student_mean, student_std, select)
            return made.to(self.device).eval().requires_grad_(False)

        # The float32 teacher is kept until `check` has compared the two.
        self.plain = network(copy.deepcopy(plain), torch.float32) if dtype != torch.float32 else None
        self.network = network(folded, dtype)
        self.no_grad = torch.inference_mode

    def __call__(self, images: Tensor, batch=None, patches: Tensor | None = None) -> Tensor:
        """`images` (batch, 3, height, width) as the student sees them: normalised, mixed, erased. patches: those it
        sees of them (patches.TeacherPatches); None for all."""
        # Autograd cannot save an inference tensor for the student's backward pass, but it can save a copy.
        return self._logits(self.network, images, patches).clone()

    def _logits(self, network: "_Network", images: Tensor, patches: Tensor | None = None) -> Tensor:
        # Not under the student's autocast: it would cast weights that have their own precision.
        with self.no_grad(), torch.autocast(self.device.type, enabled=False):
            return network(images) if patches is None else network(images, patches)

    def hookable(self) -> nn.Module:
        """The model, for forward hooks whose tensors enter the student's backward pass."""
        self.no_grad = torch.no_grad  # autograd cannot save inference tensors
        return self.network.model

    def identity(self) -> dict:
        """Equal for two teachers that give the same logits, wherever their files are."""
        precision = str(self.dtype).removeprefix("torch.")
        return {"weights": self.fingerprint, "input_size": self.input_size, "precision": precision}

    def tune(
        self, tuner: Tuner, shape: Sequence[int], dtype: torch.dtype, *, compiled: bool, question: str = "teacher"
    ) -> None:
        """Take the layout in which the teacher is fastest as it is used: on the student's images of this shape and
        dtype, in channels_last memory, and compiled or not. Nothing is compiled yet."""

        def build(layout: str):
            network = self._laid_out(layout)
            if layout in ("joined", "fused") and not layouts.is_merged(network):
                raise UserError("no convolution whose output only a ReLU reads")
            if compiled:
                network.compile(dynamic=False)
            images = torch.randn(*shape, device=self.device, dtype=dtype).to(memory_format=torch.channels_last)
            return lambda: self._logits(network, images)

        names = layouts.available(self.network.model, self.device, compiled=compiled)
        choice = tuner.choose(
            question, {name: partial(build, name) for name in names}, default="plain", dtype=self.dtype,
            key={"teacher": self.name, "images": list(shape), "compiled": compiled},
        )  # fmt: skip
        if choice.chosen != "plain":
            self.network = self._laid_out(choice.chosen)

    def _laid_out(self, layout: str) -> "_Network":
        network = copy.deepcopy(self.network)
        example = _noise(self.in_chans, self.input_size)
        network.model = layouts.laid_out(network.model, layout, example.to(self.device, self.dtype))
        network.memory_format = layouts.FORMATS[layout]
        return network

    def compile(self) -> None:
        self.network.compile(dynamic=False)

    def forget_plain(self) -> None:
        """Where nothing is going to be compared."""
        self.plain = None

    def check(self, batches: Iterable[Tensor]) -> list[str]:
        """Sentences about the teacher, to print when a run starts. In half precision its argmax on `batches` of
        training images is compared with that in float32. Raises UserError if its logits are not finite."""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)
        size = in_pixels(self.input_size)
        text = f"teacher {self.name}: {parameters / 1e6:.2f} M parameters, {precision}, {size} pixels"
        text += f", {self.folded} BatchNorms folded" if self.folded else ""
        if self.plain is None:
            return [text, *self.notes]
        agreement, images = self.agreement(batches)
        self.plain = None
        sentences = [f"{text}; agrees with fp32 on {100 * agreement:.2f} % of {images} training views", *self.notes]
        if agreement < ENOUGH:
            other = "fp16" if precision == "bf16" else "fp32"
            sentences.append(
                f"warning: in {precision} the teacher predicts another class than in fp32 for "
                f"{100 * (1 - agreement):.1f} % of the training views; --teacher-precision {other} is closer"
            )
        return sentences

    def agreement(self, batches: Iterable[Tensor]) -> tuple[float, int]:
        """(share of images on which the argmax is float32's, images)."""
        same = images = 0
        for batch in batches:
            logits, expected = self._logits(self.network, batch), self._logits(self.plain, batch)
            if not logits.isfinite().all():
                raise UserError(
                    f"the teacher {self.name} overflows in half precision: give --teacher-precision bf16 or fp32"
                )
            same += int((logits.argmax(1) == expected.argmax(1)).sum())
            images += len(batch)
        return same / images, images


def _fingerprint(loaded: LoadedModel, groups) -> str:
    """Hex digest of the loaded weights, the normalisation and the mapping of classes."""
    digest = hashlib.sha256(repr((loaded.mean, loaded.std, groups)).encode())
    for key, value in loaded.model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _noise(channels: int, size: Size) -> Tensor:
    """(2, channels, height, width) float32, always the same."""
    return torch.randn(2, channels, *height_width(size), generator=torch.Generator().manual_seed(0))


class _Network(nn.Module):
    """The student's images -> the teacher's own input -> its logits -> the data's classes; one graph to compile."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, loaded: LoadedModel, student_mean, student_std, select):
        super().__init__()
        self.model, self.dtype, self.select = model, dtype, select
        self.size = height_width(loaded.input_size)
        self.memory_format = torch.preserve_format
        # x_t = (x_s * std_s + mean_s - mean_t) / std_t as one scale and shift; None where the two agree. Decided once,
        # here: a comparison on the device would synchronise at every step. It makes three channels of a grey one.
        values = (student_mean, student_std, loaded.mean, loaded.std)
        mean_s, std_s, mean_t, std_t = (torch.tensor(value).view(1, -1, 1, 1) for value in values)
        same = torch.equal(mean_s, mean_t) and torch.equal(std_s, std_t)
        self.register_buffer("scale", None if same else std_s / std_t)
        self.register_buffer("shift", None if same else (mean_s - mean_t) / std_t)

    def forward(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        if self.scale is not None:
            images = torch.addcmul(self.shift, images.float(), self.scale)
        if images.shape[-2:] != self.size:
            images = F.interpolate(images.float(), self.size, mode="bicubic", antialias=True)
        images = images.to(self.dtype, memory_format=self.memory_format)
        logits = self.model(images) if patches is None else logits_of(self.model, images, patches)
        return logits if self.select is None else self.select(logits)


def load(settings: Distillation, device: torch.device) -> LoadedModel:
    """The teacher of --teacher-model and --teacher-path, for use on `device`: a timm model with its published weights;
    a folder of ours, timm or transformers; an address; or a file of weights, of --teacher-model unless it says
    otherwise.

    Raises UserError, or ValueError for weights that do not fit.
    """
    path, name = settings.teacher_path, settings.teacher_model
    if path is not None and not sources.exists(path):
        raise UserError(f"--teacher-path {path}: there is no such file or folder")
    try:
        if path is None:
            loaded = load_model(name, pretrained=True, input_size=settings.teacher_input_size, device=device)
        else:
            chosen = {"default_name" if name == Distillation().teacher_model else "name": name}
            loaded = load_model(path, **chosen, input_size=settings.teacher_input_size, device=device)
    except UserError as error:
        message = str(error).replace("--model", "--teacher-model").replace("--input-size", "--teacher-input-size")
        raise UserError(message) from error
    if not loaded.num_classes:
        raise UserError(
            f"the teacher {loaded.name} has no classification head: choose another, or fit one with "
            "`python -m fastdeit.teach fit --data-path DIR --model NAME`"
        )
    return loaded


def class_groups(loaded: LoadedModel, mapping: str | None, classes: Sequence[str]) -> list[list[int]] | None:
    """The teacher's classes for each of the data's, from the file of --teacher-classes; None where both are the same.

    A head is never replaced: a teacher of other classes than the data's is refused unless a file maps them.
    """
    if mapping is not None:
        return read_groups(mapping, classes, loaded.classes, loaded.num_classes)
    same_classes(loaded.name, loaded.classes, loaded.num_classes, classes)
    return None


def load_teacher(settings: Distillation, classes: Sequence[str], *, student_mean, student_std, world: World) -> Teacher:
    """The only teacher of the settings, which `speed_up` then makes fast; UserError unless its classes are the data's,
    or mapped to them."""
    loaded = load(settings, world.device)
    groups = class_groups(loaded, settings.teacher_classes, classes)
    # fp16 rounds eight times finer than bf16: of 4,224 mixed views of the digits it agreed with fp32 on 99.95 %,
    # bf16 on 99.50 %. An overflow is found by `check`, and in the loss.
    precision = settings.teacher_precision or ("fp16" if world.device.type == "cuda" else "fp32")
    return Teacher(
        loaded, groups=groups, student_mean=student_mean, student_std=student_std, device=world.device,
        dtype=PRECISIONS[precision],
    )  # fmt: skip


def speed_up(teacher, config: Config, tuner: Tuner) -> None:
    """Lay a Teacher or Teachers out and compile them as the settings say, for images as the run's student sees them."""
    device, sides = tuner.world.device, height_width(config.data.input_size)
    compiled = compiles(config, device)
    teacher.tune(
        tuner, (config.data.batch_size, config.data.in_chans, *sides), precision_of(config, device), compiled=compiled
    )
    if compiled:
        teacher.compile()
