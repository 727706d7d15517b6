"""mix_normalize: its definition, timm's numbers, the noise, independence from the batch, registration, bad input."""

import math
import random

import numpy as np
import pytest
import torch

from fastdeit.kernels import mix_normalize
from fastdeit.kernels.mix_normalize import noise
from fastdeit.kernels.mix_normalize.api import _mix_normalize
from fastdeit.kernels.mix_normalize.noise import philox, pixel_noise
from fastdeit.kernels.mix_normalize.reference import mix_normalize_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)


def random_draws(batch: int, height: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every kind of sample in one batch: unmixed, mixup, cutmix, erased, boxes that touch or cross the borders."""
    generator = torch.Generator().manual_seed(seed)

    def boxes():
        corners = torch.rand(batch, 4, generator=generator) * torch.tensor([height, width, height, width])
        top_left, bottom_right = corners.view(batch, 2, 2).amin(1).floor(), corners.view(batch, 2, 2).amax(1).ceil()
        given = torch.rand(batch, 1, generator=generator) < 0.6
        return torch.where(given, torch.cat((top_left, bottom_right), 1), torch.zeros(batch, 4)).int()

    draws = {
        "partner": torch.randperm(batch, generator=generator),
        "lam": torch.rand(batch, generator=generator),
        "box": boxes(),
        "erase_box": boxes(),
        "erase_seed": torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator),
    }
    draws["lam"][0], draws["box"][0] = 1, 0
    draws["erase_box"][-1] = torch.tensor([0, 0, height, width])
    return draws


def noise_of(seed: int, *box: int) -> torch.Tensor:
    (noise,) = pixel_noise([seed], [box])
    return noise


def normalised(images: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    x = images.permute(0, 3, 1, 2).to(dtype) / 255
    return (x - torch.tensor(MEAN, dtype=dtype)[:, None, None]) / torch.tensor(STD, dtype=dtype)[:, None, None]


def oracle(images: torch.Tensor, draws: dict[str, torch.Tensor]) -> torch.Tensor:
    """The definition, written out in float64."""
    B, H, W, _ = images.shape
    clean = normalised(images)
    for i in range(B):
        y0, x0, y1, x1 = draws["erase_box"][i].tolist()
        noise = noise_of(draws["erase_seed"][i].item(), 0, 0, H, W).view(H, W, 3).permute(2, 0, 1)
        clean[i, :, y0:y1, x0:x1] = noise[:, y0:y1, x0:x1].double()
    out = clean.clone()
    for i in range(B):
        y0, x0, y1, x1 = draws["box"][i].tolist()
        other, lam = clean[draws["partner"][i]], draws["lam"][i].double()
        if y1 > y0 and x1 > x0:
            out[i, :, y0:y1, x0:x1] = other[:, y0:y1, x0:x1]
        else:
            out[i] = lam * clean[i] + (1 - lam) * other
    return out


def check_against_the_definition(size, dtype, channels_last, device="cpu"):
    images, draws = random_images(*size), random_draws(*size)
    expected = oracle(images, draws)
    draws = {name: tensor.to(device) for name, tensor in draws.items()}
    out = mix_normalize(images.to(device), MEAN, STD, **draws, dtype=dtype, channels_last=channels_last)
    assert out.dtype == dtype and out.shape == expected.shape
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    # Half an ulp of the rounded result, and 2e-6 for the float32 arithmetic on numbers up to 6.
    budget = 0.5 * torch.finfo(dtype).eps * expected.abs().clamp(min=1) + 2e-6
    assert ((out.cpu().double() - expected).abs() <= budget).all()


# One size whose rows fill words of four columns, two that do not, one pixel. The largest spans several tiles.
SIZES = [(5, 64, 32), (4, 9, 13), (3, 17, 7), (1, 1, 1)]
LAYOUTS = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_definition(size, dtype, channels_last):
    check_against_the_definition(size, dtype, channels_last)


@pytest.mark.interpreter
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_matches_the_definition(size, dtype, channels_last):
    check_against_the_definition(size, dtype, channels_last)


@pytest.mark.interpreter
@pytest.mark.parametrize("given", [(), ("partner", "lam"), ("partner", "lam", "box"), ("erase_box", "erase_seed")])
def test_kernel_takes_any_part_of_the_draws(given):
    images, draws = random_images(4, 10, 12), random_draws(4, 10, 12)
    draws = {name: tensor if name in given else None for name, tensor in draws.items()}
    out = mix_normalize(images, MEAN, STD, **draws)
    torch.testing.assert_close(out, mix_normalize_reference(images, MEAN, STD, **draws), rtol=0, atol=2e-6)


@pytest.mark.interpreter
@LAYOUTS
def test_kernel_writes_its_output_and_nothing_else(monkeypatch, channels_last):
    from fastdeit.kernels.mix_normalize import triton_kernels

    B, H, W = 2, 5, 7
    guarded = torch.full((B * 3 * H * W + 64,), float("nan"))

    def inside_guards(images, dtype, channels_last):
        middle = guarded[32:-32]
        return middle.view(B, H, W, 3).permute(0, 3, 1, 2) if channels_last else middle.view(B, 3, H, W)

    monkeypatch.setattr(triton_kernels, "empty_output", inside_guards)
    images, draws = random_images(B, H, W), random_draws(B, H, W)
    triton_kernels.mix_normalize_triton(images, MEAN, STD, *draws.values(), torch.float32, channels_last)
    assert guarded[:32].isnan().all() and guarded[-32:].isnan().all() and not guarded[32:-32].isnan().any()


@pytest.mark.interpreter
def test_kernel_marks_samples_whose_partner_is_outside_the_batch():
    from fastdeit.kernels.mix_normalize.triton_kernels import mix_normalize_triton

    partner, lam = torch.tensor([1, -1, 3, 3]), torch.tensor([0.5, 0.5, 0.5, 1.0])
    out = mix_normalize_triton(
        random_images(4, 3, 4), MEAN, STD, partner.add(1), lam, None, None, None, torch.float32, True
    )
    assert out.flatten(1).isnan().all(1).tolist() == [False, False, True, False]


class ReplayedErasing:
    """timm's RandomErasing, remembering its rectangles and drawing its pixels from our generator."""

    def __init__(self, monkeypatch, seeds: torch.Tensor):
        from timm.data import random_erasing

        self.erasing = random_erasing.RandomErasing(probability=0.6, mode="pixel", device="cpu")
        self.boxes = torch.zeros(len(seeds), 4, dtype=torch.int32)
        self.seeds = seeds
        self.corner = []
        randint = random.randint
        monkeypatch.setattr(random, "randint", lambda a, b: self.corner.append(randint(a, b)) or self.corner[-1])
        monkeypatch.setattr(random_erasing, "_get_pixels", self.pixels)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        for self.sample in range(len(images)):
            self.corner.clear()
            self.erasing(images[self.sample])
        return images

    def pixels(self, per_pixel, rand_color, patch_size, dtype, device):
        assert per_pixel
        (top, left), (_, h, w) = self.corner, patch_size
        self.boxes[self.sample] = torch.tensor([top, left, top + h, left + w])
        noise = noise_of(self.seeds[self.sample].item(), top, left, top + h, left + w)
        return noise.view(h, w, 3).permute(2, 0, 1).to(dtype)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("cutmix", [False, True])
def test_same_numbers_as_timm_in_the_recipes_order(monkeypatch, mode, cutmix):
    timm_mixup = pytest.importorskip("timm.data.mixup")
    B, H, W = 16, 32, 40
    images = random_images(B, H, W)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002, it is what timm draws from

    erasing = ReplayedErasing(monkeypatch, torch.randint(0, 2**62, (B,)))
    expected = erasing(normalised(images, torch.float32))

    # Mixup's draws: boxes as they pass, and the lambda it returns for the labels.
    boxes, draw_box = [], timm_mixup.cutmix_bbox_and_lam

    def remember_box(*args, **kwargs):
        (yl, yh, xl, xh), lam = draw_box(*args, **kwargs)
        boxes.append([yl, xl, yh, xh])
        return (yl, yh, xl, xh), lam

    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", remember_box)
    mixup = timm_mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=float(cutmix), mode=mode, num_classes=3)
    lams = {}
    mix = getattr(mixup, f"_mix_{mode}")
    monkeypatch.setattr(mixup, f"_mix_{mode}", lambda x: lams.setdefault("lam", mix(x)))
    expected, _ = mixup(expected, torch.zeros(B, dtype=torch.long))

    lam = torch.as_tensor(lams["lam"], dtype=torch.float32).flatten().expand(B).contiguous()
    box = torch.zeros(B, 4, dtype=torch.int32)
    if cutmix:
        drawn = torch.tensor(boxes, dtype=torch.int32)
        box = torch.cat((drawn, drawn.flip(0))) if mode == "pair" else drawn.expand(B, 4)
    out = mix_normalize(
        images,
        MEAN,
        STD,
        partner=torch.arange(B).flip(0),
        lam=lam,
        box=box.contiguous(),
        erase_box=erasing.boxes,
        erase_seed=erasing.seeds,
    )
    assert (erasing.boxes[:, 2] > 0).float().mean() > 0.3, "too few samples were erased for the test to mean something"
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_a_sample_depends_on_itself_and_its_partner_alone():
    B, H, W = 6, 21, 19
    images, draws = random_images(B, H, W), random_draws(B, H, W)
    out = mix_normalize(images, MEAN, STD, **draws)
    for i in range(B):
        j = draws["partner"][i].item()
        pair = [i, j] if i != j else [i]
        alone = {name: tensor[pair] for name, tensor in draws.items()}
        alone["partner"] = torch.tensor([len(pair) - 1, 0][: len(pair)])
        assert torch.equal(mix_normalize(images[pair], MEAN, STD, **alone)[0], out[i])


def test_layout_and_repetition_do_not_change_a_bit():
    size = (4, 23, 29)
    images, draws = random_images(*size), random_draws(*size)
    out = mix_normalize(images, MEAN, STD, **draws)
    assert torch.equal(out, mix_normalize(images, MEAN, STD, **draws, channels_last=False))
    assert torch.equal(out, mix_normalize(images, MEAN, STD, **draws))
    assert torch.equal(out.half(), mix_normalize(images, MEAN, STD, **draws, dtype=torch.float16))


def test_boxes_that_leave_the_image_are_clipped():
    images, H, W = random_images(2, 8, 8), 8, 8
    draws = {"partner": torch.tensor([1, 0]), "lam": torch.tensor([0.25, 0.5]), "erase_seed": torch.tensor([1, 2])}
    crossing = {"box": [-3, 2, 5, 99], "erase_box": [4, -7, 99, 3]}
    clipped = {"box": [0, 2, 5, W], "erase_box": [4, 0, H, 3]}
    outside = {"box": [9, 9, 20, 20], "erase_box": [-5, -5, 0, 0]}
    empty = {"box": [0, 0, 0, 0], "erase_box": [0, 0, 0, 0]}

    def run(boxes):
        both = {name: torch.tensor([box, box], dtype=torch.int32) for name, box in boxes.items()}
        return mix_normalize(images, MEAN, STD, **draws, **both)

    assert torch.equal(run(crossing), run(clipped))
    assert torch.equal(run(outside), run(empty))


# Known answers of philox4x32-10, from the Random123 library (kat_vectors).
@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])
    assert tuple(word.item() for word in words) == expected


def test_noise_is_standard_normal_and_uncorrelated():
    noise = noise_of(1234, 0, 0, 200, 200).view(200, 200, 3).double()
    sample = noise.flatten()
    n = len(sample)
    assert abs(sample.mean()) < 4 / math.sqrt(n)
    assert abs(sample.var() - 1) < 4 * math.sqrt(2 / n)
    distance = (torch.special.ndtr(sample.sort().values) - torch.arange(1, n + 1) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at p = 0.001
    shifted = {
        "channel": (noise[..., 0], noise[..., 1]),
        "x": (noise[:, 1:], noise[:, :-1]),
        "y": (noise[1:], noise[:-1]),
        "seed": (noise, noise_of(1235, 0, 0, 200, 200).view(200, 200, 3).double()),
        "high word of the seed": (noise, noise_of(1234 + 2**32, 0, 0, 200, 200).view(200, 200, 3).double()),
    }
    for name, (a, b) in shifted.items():
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel()), name
        assert not torch.equal(a, b), name


def test_noise_depends_on_the_position_in_the_image_alone(monkeypatch):
    boxes = [(3, 5, 9, 16), (0, 1, 12, 2), (11, 16, 12, 17), (0, 0, 12, 17), (2, 3, 3, 10)]
    whole = {seed: noise_of(seed, 0, 0, 12, 17) for seed in range(-2, 3)}
    for at_once in (1, 100, 8192):  # Philox calls that are computed together
        monkeypatch.setattr(noise, "CALLS_AT_ONCE", at_once)
        for (seed, expected), (y0, x0, y1, x1), patch in zip(whole.items(), boxes, pixel_noise(list(whole), boxes)):
            assert torch.equal(patch, expected[y0:y1, 3 * x0 : 3 * x1]), seed


def test_opcheck():
    images, draws = random_images(3, 8, 6), random_draws(3, 8, 6)
    mean, std = list(MEAN), list(STD)
    torch.library.opcheck(_mix_normalize, (images, mean, std, *draws.values(), torch.float16, True))
    torch.library.opcheck(_mix_normalize, (images, mean, std, *[None] * 5, torch.float32, False))


def test_compiles_without_a_graph_break():
    images, draws = random_images(3, 8, 6), random_draws(3, 8, 6)

    def step(images, draws):
        return torch.nn.functional.relu(mix_normalize(images, MEAN, STD, **draws))

    assert torch.equal(torch.compile(step, fullgraph=True)(images, draws), step(images, draws))


def test_empty_batch():
    assert mix_normalize(random_images(0, 8, 6), MEAN, STD).shape == (0, 3, 8, 6)


IMAGES = random_images(2, 4, 4)
PARTNER, LAM = torch.tensor([1, 0]), torch.ones(2)
BOX, SEED = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "images, arguments, message",
    [
        (IMAGES.permute(0, 3, 1, 2), {}, "batch, height, width, 3"),
        (IMAGES.float(), {}, "uint8"),
        (IMAGES.transpose(1, 2), {}, "contiguous"),
        (IMAGES, {"mean": (0.5, 0.5)}, "three floats"),
        (IMAGES, {"mean": (124.0, 116.0, 104.0)}, "divide by 255"),
        (IMAGES, {"std": (0.0, 1.0, 1.0)}, "std above 0"),
        (IMAGES, {"dtype": torch.float64}, "float32, float16 or bfloat16"),
        (IMAGES, {"lam": LAM}, "without partner"),
        (IMAGES, {"partner": PARTNER}, "without lam"),
        (IMAGES, {"box": BOX}, "without partner"),
        (IMAGES, {"erase_box": BOX}, "without erase_seed"),
        (IMAGES, {"erase_seed": SEED}, "without erase_box"),
        (IMAGES, {"partner": PARTNER, "lam": LAM.double()}, "lam must be"),
        (IMAGES, {"partner": PARTNER[:1], "lam": LAM}, "partner must be"),
        (IMAGES, {"partner": PARTNER, "lam": LAM, "box": BOX.long()}, "box must be"),
        (IMAGES, {"partner": PARTNER + 1, "lam": LAM}, "positions of this batch"),
        (IMAGES, {"partner": PARTNER.to("meta"), "lam": LAM}, "one device"),
    ],
)
def test_bad_input_is_said_in_words(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        mix_normalize(images, **({"mean": MEAN, "std": STD} | arguments))


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (8, 224, 224)], ids=str)
def test_gpu_matches_the_definition(size, dtype, channels_last):
    check_against_the_definition(size, dtype, channels_last, device="cuda")


@pytest.mark.gpu
def test_gpu_gives_the_same_bits_a_hundred_times():
    images, draws = random_images(4, 96, 96).cuda(), random_draws(4, 96, 96)
    draws = {name: tensor.cuda() for name, tensor in draws.items()}
    first = mix_normalize(images, MEAN, STD, **draws)
    assert all(torch.equal(mix_normalize(images, MEAN, STD, **draws), first) for _ in range(100))


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_images_and_draws():
    size = (4, 96, 96)
    images, draws = random_images(*size).cuda(), {name: t.cuda() for name, t in random_draws(*size).items()}
    mix_normalize(images, MEAN, STD, **draws, dtype=torch.bfloat16)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mix_normalize(images, MEAN, STD, **draws, dtype=torch.bfloat16)
    images.copy_(random_images(*size, seed=1))
    for name, tensor in random_draws(*size, seed=1).items():
        draws[name].copy_(tensor)
    graph.replay()
    assert torch.equal(out, mix_normalize(images, MEAN, STD, **draws, dtype=torch.bfloat16))
