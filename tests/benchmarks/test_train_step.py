"""The contenders of the train step do the same work, and what is derived from their times is right."""

import argparse
import copy
from itertools import islice, repeat

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import mixup_target

from benchmarks import peers, steps, train_step
from benchmarks.gpu_work import work_in
from benchmarks.steps import configuration, loop_on, noise, our_step
from benchmarks.teacher import best_teacher
from benchmarks.timing import Timing
from fastdeit.config import Config
from fastdeit.distributed.world import World

STUDENT, PIXELS, BATCH, CLASSES, LR = "deit_tiny_distilled_patch16_224", 32, 8, 1000, 1e-3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return timm.create_model("test_byobnet", num_classes=CLASSES).eval()


@pytest.fixture
def loop():
    config = configuration(STUDENT, batch_size=BATCH, pixels=PIXELS, compile=False)
    config.model.drop_path, config.optimization.warmup_epochs = 0.0, 0
    config.optimization.unscale_lr, config.optimization.lr = True, LR
    world = World(CPU)
    loop = loop_on(config, world, noise(config, world))
    with torch.no_grad():  # so that the loss depends on the images, which at the start it hardly does
        for head in (loop.trainer.model.head, loop.trainer.model.head_dist):
            head.weight.mul_(30)
    return loop


def three(step):
    return [step().item() for _ in range(3)]


def test_all_train_alike(loop, teacher):
    """On the same images, unmixed: the losses of three steps, so that optimizer and weight decay take part too."""
    if (lacking := peers.timm_lacks()) is not None:
        pytest.skip(lacking)
    batch = next(iter(loop.train_loader))._replace(mix=None)
    trainer = loop.trainer
    images = trainer.prepare(batch)
    targets = mixup_target(batch.labels, CLASSES, smoothing=peers.SMOOTHING)

    def student():
        theirs = peers.student_of_timm(STUDENT, classes=CLASSES, pixels=PIXELS, drop_path=0.0)
        theirs.load_state_dict(trainer.model.state_dict())
        return theirs

    settings = {"device": CPU, "dtype": torch.float32, "lr": LR}
    steps = {
        "timm": peers.Timm(student(), copy.deepcopy(teacher), compile=False, channels_last=False, **settings),
        "timm, channels_last": peers.Timm(
            student(), copy.deepcopy(teacher), compile=False, channels_last=True, **settings
        ),
        "deit": peers.Deit(student(), copy.deepcopy(teacher), **settings),
    }
    ours = three(our_step(loop, best_teacher(teacher, trainer, compiled=False), [batch]))
    assert abs(ours[0] - ours[2]) > 0.2  # it learns: what follows compares more than the start
    for name, step in steps.items():
        theirs = three(lambda step=step: step(images, targets))
        assert theirs == pytest.approx(ours, rel=2e-3), name
        assert theirs[0] == pytest.approx(ours[0], rel=1e-5), name


def test_averages_move_alike(loop, teacher):
    """The moving average is the recipe's in all: after a step it stands where decay has it."""
    theirs = peers.student_of_timm(STUDENT, classes=CLASSES, pixels=PIXELS, drop_path=0.0)
    before = copy.deepcopy(theirs.state_dict())
    images, targets = torch.randn(4, 3, PIXELS, PIXELS), torch.full((4, CLASSES), 1 / CLASSES)
    step = peers.Deit(theirs, copy.deepcopy(teacher), device=CPU, dtype=torch.float32, lr=LR)
    step(images, targets)
    assert loop.trainer.config.model.model_ema_decay == peers.DECAY
    weight, average = theirs.head.weight.detach(), step.ema.ema.head.weight
    expected = peers.DECAY * before["head.weight"] + (1 - peers.DECAY) * weight
    assert torch.allclose(average, expected, atol=1e-9) and not torch.equal(average, weight)


def test_batches_of_timm_are_fresh_each_time():
    """Mixing works in place: what lies on the device must not wear away."""
    images = torch.randint(0, 256, (4, 3, PIXELS, PIXELS), dtype=torch.uint8)
    before = images.clone()
    batches = peers.mixed(peers.noise(images, torch.arange(4), erase=0.25), CLASSES)
    for _ in range(8):
        mixed, targets = next(batches)
        assert mixed.isfinite().all() and targets.sum(1) == pytest.approx(torch.ones(4))
    assert torch.equal(images, before)


def test_flops_are_those_of_the_products():
    tokens, width, depth, patches = 198, 192, 12, 196
    block = tokens * 12 * width**2 + 2 * tokens**2 * width  # multiplications of the linear layers, of attention
    last = tokens * 3 * width**2 + 2 * 9 * width**2 + 2 * 2 * tokens * width  # two tokens ask, all answer
    embedding, heads = patches * 768 * width, 2 * width * CLASSES
    forward = 2 * ((depth - 1) * block + last + embedding + heads)
    # Twice as many backward, but that no gradient of the images is asked for.
    assert train_step.flops_per_image(STUDENT, 224) == 3 * forward - 2 * embedding


def test_peak_by_the_name_of_the_gpu(monkeypatch):
    def peak(name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return train_step.datasheet_peak("cuda")

    assert peak("NVIDIA H200") == peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12 and peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("NVIDIA T4") is None and train_step.datasheet_peak("cpu") is None


def test_work_of_a_trace():
    def event(kind, name, ts, dur):
        return {"cat": kind, "name": name, "ts": ts, "dur": dur}

    trace = [
        event("cuda_runtime", "cudaLaunchKernel", 0, 2),
        event("cuda_driver", "cuLaunchKernelEx", 2, 2),
        event("cuda_runtime", "cudaGraphLaunch", 4, 2),
        event("cuda_runtime", "cudaMemcpyAsync", 6, 2),
        event("cuda_runtime", "cudaDeviceSynchronize", 8, 90),
        event("gpu_user_annotation", "Optimizer.step", 10, 90),
        event("kernel", "a", 10, 10),
        event("kernel", "b", 15, 10),  # on another stream, half of it at the same time
        event("kernel", "c", 16, 2),
        event("gpu_memcpy", "copy", 40, 10),
        {"name": "process_name"},
    ]
    work = work_in(trace, steps=5)
    assert (work.launches, work.kernels, work.busy_us) == (3 / 5, 3 / 5, 25 / 5)
    assert work.idle_share(10.0) == 0.5 and work.idle_share(4.0) == 0.0


def result_of(milliseconds, gpu=False):
    result = train_step.Result.__new__(train_step.Result)
    arguments = argparse.Namespace(batch_size=100, teacher="regnety_160")
    result.case = argparse.Namespace(student="s", arguments=arguments, device=torch.device("cuda" if gpu else "cpu"))
    result.timings = {name: Timing(1e3 * ms, 1e3 * ms, 1e3 * ms) for name, ms in milliseconds.items()}
    result.flops, result.work = 2e12, {}
    result.peaks = dict.fromkeys(milliseconds, 5e6 if gpu else None)
    return result


def test_headlines_name_the_fastest_peer():
    times = {train_step.CACHED: 10, train_step.LIVE: 20, train_step.DEIT: 60, "timm": 50, "timm, channels_last": 40}
    live, cached = result_of(times, gpu=True).headlines(measured_peak=800e12)
    assert (live.peer, live.ratio, live.floor_share) == ("timm, channels_last", 2.0, None)
    assert (cached.ratio, cached.ours, cached.theirs) == (4.0, "10,000 images/s", "2,500 images/s")
    assert cached.floor_share == 0.25  # 2 TFLOP in 10 ms, of 800 TFLOP/s
    (cached,) = result_of({train_step.CACHED: 10, train_step.DEIT: 60}).headlines(None)
    assert (cached.peer, cached.ratio) == (train_step.DEIT, 6.0)
    assert result_of({train_step.CACHED: 10, "fastdeit, nothing compiled": 20}).headlines(None) == []


def test_rows_leave_out_what_is_not_known():
    times = {train_step.CACHED: 10, train_step.LIVE: 20}
    (cached, _), (on_gpu, _) = result_of(times).rows((None, None)), result_of(times, gpu=True).rows((989e12, 800e12))
    assert dict(zip(train_step.COLUMNS, cached)) == {
        "student": "s", "contender": train_step.CACHED, "ms": "10.00", "ms_p10": "10.00", "ms_p90": "10.00",
        "images_per_s": "10000.0", "times_live": "0.500", "mfu_datasheet": "", "mfu_measured": "", "peak_mb": "",
        "launches": "", "kernels": "", "idle_share": "",
    }  # fmt: skip
    assert on_gpu[7:10] == ["0.202", "0.250", "5"]


def test_a_contender_that_fails_is_named_and_the_others_are_measured(capsys):
    case = argparse.Namespace(
        student=STUDENT, device=CPU, arguments=argparse.Namespace(batch_size=2, pixels=PIXELS),
        contenders=lambda waterfall: {"broken": lambda: 1 / 0, "nan": lambda: lambda: torch.tensor(float("nan")),
                                      "good": lambda: lambda: next(repeat(torch.tensor(1.0)))},
    )  # fmt: skip
    result = train_step.Result(case, waterfall=False, warm_up=1)
    assert list(result.steps) == ["good"]
    assert [reason.split(": ")[1:] for reason in result.missing] == [
        ["ZeroDivisionError", "division by zero"], ["ValueError", "the loss is nan"],
    ]  # fmt: skip


def test_the_step_that_is_timed_is_the_one_that_a_user_gets(monkeypatch, tmp_path):
    """Every setting of speed has its default, unless a flag of the benchmark says otherwise."""
    arguments = argparse.Namespace(
        device="cpu", teacher="test_byobnet", batch_size=BATCH, pixels=PIXELS, compile=False, quick=True
    )
    case, built = train_step.Case(arguments, STUDENT, tmp_path), []
    loop_on = train_step.steps.loop_on
    monkeypatch.setattr(
        train_step.steps, "loop_on", lambda config, *rest: built.append(config) or loop_on(config, *rest)
    )
    contenders = case.contenders(waterfall=True)
    for name in (train_step.LIVE, train_step.CACHED):
        assert contenders[name]()().isfinite()
        assert built[-1].speed == Config().speed, name
        assert case.conditions()[name]["CUDA graph"] is False
    contenders["fastdeit, teacher not folded"]()
    assert built[-1].speed.cuda_graph == "off" == built[-1].speed.tune
    arguments.compile = True
    with pytest.raises(StopIteration):
        monkeypatch.setattr(train_step.steps, "loop_on", lambda config, *rest: built.append(config) or next(iter(())))
        contenders[train_step.LIVE]()
    assert built[-1].speed.compile is True


def test_cached_logits_come_with_the_batch_in_the_order_of_the_cache(loop, tmp_path):
    batches = [next(iter(loop.train_loader))]
    cache = steps.random_cache(tmp_path / "same", np.zeros((1, steps.CACHED_STEPS * BATCH), np.int64), BATCH)
    labels = cache.rows(0, slice(0, 2 * BATCH))["labels"]
    first, second = islice(steps.with_cached_logits(tmp_path / "cache", batches), 2)
    assert torch.cat([first.targets, second.targets]).tolist() == labels.tolist()
    assert steps.of_the_batch(None, first) is first.targets and first.labels is batches[0].labels
