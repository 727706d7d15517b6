"""The curriculum's arithmetic, pinned by hand from the published schedule, and what of it is refused."""

import math

import pytest

from fastdeit import train
from fastdeit.cli import parse_config
from fastdeit.curriculum import Curriculum, Part
from fastdeit.errors import UserError
from fastdeit.models.build import build_student
from fastdeit.training.optimizer import learning_rate

from .conftest import SMALL, refused

PUBLISHED_SIZES = [96] * 2 + [160] * 4 + [192] * 2 + [224] * 2  # _ET_pp_main_deitS.py, res_list


def efficienttrain(budget):
    return Curriculum.read("efficienttrain", budget, 224)


def lengths(curriculum):
    return [part.end - part.first for part in curriculum.parts]


def test_the_published_schedule_by_hand():
    """A part has 10 epochs of work: 10 x (224 / 96)^2 = 54.44 at 96 pixels, 19.6 at 160, 13.61 at 192, 10 at 224. Their
    sums, rounded: 54.44, 108.89, 128.49, 148.09, 167.69, 187.29, 200.9, 214.51, 224.51, 234.51."""
    curriculum = efficienttrain(100)
    assert [part.end for part in curriculum.parts] == [54, 109, 128, 148, 168, 187, 201, 215, 225, 235]
    assert [part.size for part in curriculum.parts] == PUBLISHED_SIZES
    assert [part.magnitude for part in curriculum.parts] == list(range(10))  # --aa rand-m{ET_index}-mstd0.5-inc1
    assert curriculum.epochs == 235 and curriculum.sizes == (96, 160, 192, 224)
    assert curriculum.part(0) == curriculum.part(53) == Part(96, 0, 0, 54)
    assert curriculum.part(54).magnitude == 1 and curriculum.part(108).size == 96
    assert curriculum.part(109).size == 160 and curriculum.part(234).magnitude == curriculum.part(999).magnitude == 9
    assert curriculum.magnitudes[:3] == ((0, 0), (54, 1), (109, 2))
    assert (
        "235 epochs, the work of 100 at 224 pixels: 96 pixels until epoch 109, 160 until 187" in curriculum.in_words()
    )


def as_released(budget):
    """Epochs of each part in the released code: main_buffer.py runs each from where the one before ended, converted to
    its own epochs, up to end_epoch (_ET_pp_main_deitS.py), in whole epochs."""
    made, end, before = [], 0, None
    for number, size in enumerate(PUBLISHED_SIZES):
        whole = int(budget * (224 * 224) / (size * size))
        start = end if before in (None, size) else round(end * before**2 / size**2)
        end, before = int(whole / 10 * (number + 1)), size
        made.append(end - start)
    return made


@pytest.mark.parametrize("budget", [100, 150, 200, 300])
def test_as_in_the_released_code(budget):
    """To one epoch a part: it rounds down, in the middle too."""
    released = as_released(budget)
    assert all(abs(ours - theirs) <= 1 for ours, theirs in zip(lengths(efficienttrain(budget)), released))
    assert abs(efficienttrain(budget).epochs - sum(released)) <= 1


@pytest.mark.parametrize("budget", [10, 100, 333])
def test_work_is_equal_in_all_parts(budget):
    curriculum, steps = efficienttrain(budget), 1251
    for number, part in enumerate(curriculum.parts):
        assert math.isclose(curriculum.work(part.end * steps, steps), (number + 1) * budget / 10 * steps)
        middle = (part.first + part.end) * steps // 2
        assert math.isclose(curriculum.work(middle, steps), (number + 0.5) * budget / 10 * steps, rel_tol=1e-3)
        # so a step costs what its pixels are of a full image, but for the rounding of the part's end
        each = curriculum.work(part.end * steps, steps) - curriculum.work(part.end * steps - 1, steps)
        assert each == pytest.approx((part.size / 224) ** 2, abs=1 / (part.end - part.first))


def test_without_a_curriculum_a_step_is_a_step():
    curriculum = Curriculum.read("none", 7, (16, 24))
    assert curriculum.parts == (Part((16, 24), None, 0, 7),) and curriculum.epochs == 7 and not curriculum.magnitudes
    assert [curriculum.work(step, 13) for step in range(92)] == list(range(92))


def test_the_learning_rate_is_a_function_of_the_work():
    """Warm-up over a fifth of the work (_ET_pp_main_deitS.py), which is the two parts at 96 pixels; half a cosine over
    all of it: at the end of the i-th part cos(pi i / 10)."""
    curriculum, steps, peak = efficienttrain(100), 312, 4e-3
    rates = {"peak": peak, "total_steps": 100 * steps, "warmup_steps": 20 * steps, "warmup_lr": 0.0, "min_lr": 1e-6}
    at = [learning_rate(curriculum.work(part.end * steps, steps), **rates) for part in curriculum.parts]
    assert at[0] == pytest.approx(peak / 2)
    for number in range(2, 11):
        expected = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * number / 10)) / 2
        assert at[number - 1] == pytest.approx(expected)


def test_sizes_alone_and_parts_too_short_for_an_epoch():
    curriculum = Curriculum.read("14,14,21,28,28", 5, 28)
    assert [part.end for part in curriculum.parts] == [4, 8, 10, 11, 12] and curriculum.magnitudes == ()
    short = Curriculum.read("14:0,24:1,26:4,28:9", 2, 28)  # 2, 2.68, 3.26, 3.76 epochs, rounded
    assert lengths(short) == [2, 1, 0, 1] and short.magnitudes == ((0, 0), (2, 1), (3, 9))
    assert [short.work(4 * epoch, 4) / 4 for epoch in range(5)] == [0, 0.25, 0.5, 1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

RAND = ("--aa", "rand-m9-mstd0.5-inc1")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--curriculum", "8:0,16"], ["SIZE:MAGNITUDE", "or none"]),
        (["--curriculum", "8x16"], ["SIZE:MAGNITUDE", "efficienttrain"]),
        (["--curriculum", "efficienttrain", *RAND], ["224 is above that of the images, 16"]),
        (["--curriculum", "8,12"], ["its last size, 12, is not that of the images, 16", "--input-size"]),
        (["--curriculum", "8:0,16:9", "--aa", "3aug"], ["--aa is 3aug", "sizes alone"]),
        (["--curriculum", "10,16"], ["10 pixels do not divide into the 4-pixel patches", "multiples"]),
        (["--curriculum", "8,16", "--input-size", "16", "24"], ["square"]),
        (["--curriculum", "12,14,16", "--patch-size", "2", "--epochs", "1"], ["would have no epoch", "--epochs 3"]),
        (
            ["--curriculum", "16,32", "--input-size", "32", "--model", "vit_tiny_patch16_224"],
            ["vit_tiny_patch16_224 does not take images of 16 pixels", "deit_*"],
        ),
        (
            ["--curriculum", "8,16", "--distillation-type", "soft", "--attention-distillation-weight", "1"],
            ["--attention-distillation-weight", "the teacher sees full images"],
        ),
    ],
)
def test_refused(cli, colors, arguments, words, tmp_path):
    folder = tmp_path / "run"
    command = [*SMALL, "--data-path", colors, "--output-dir", folder, *arguments]
    refused(cli, train.main, *command, words=["--curriculum" if "--epochs" not in arguments else "--epochs", *words])
    assert not folder.exists()


def test_extending_a_run_has_small_images_behind_it(run):
    with pytest.raises(UserError, match="--curriculum none"):
        parse_config(["--extend", str(run), "--epochs", "6", "--curriculum", "8,16"])


def test_cnns_of_timm_take_any_size():
    command = [*SMALL, "--model", "test_resnet", "--input-size", "64", "--curriculum", "40,64"]
    build_student(parse_config(command), 3)
