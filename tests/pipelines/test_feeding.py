"""What is done ahead, and in which thread: reading off the thread that trains, the order of the next epoch in time."""

import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from fastdeit.pipelines import SyntheticIndex, train_loader
from fastdeit.pipelines.augment import plan
from fastdeit.pipelines.augment.sampler import epoch_order
from fastdeit.pipelines.bad_files import DecodeError
from fastdeit.pipelines.decode import prefetch

IMAGES, BATCH, STEPS = 64, 4, 16


class Spy:
    """A decoder that notes what is asked of it, by which thread, and fails where it is told to."""

    def __init__(self, decoder, *, fails_to_feed=None, fails_to_decode=None):
        self.decoder, self.threads, self.counts = decoder, {}, Counter()
        self.fails_to_feed, self.fails_to_decode = fails_to_feed, fails_to_decode
        self.steps, self.most = [], {"fed": 0, "started": 0}

    def _note(self, what):
        self.threads.setdefault(what, set()).add(threading.current_thread().name)
        self.counts[what] += 1

    def feed(self, plan):
        self._note("feed")
        if plan.step == self.fails_to_feed:
            raise ZeroDivisionError(f"of step {plan.step}")
        self.decoder.feed(plan)

    def start(self):
        self._note("start")
        self.decoder.start()

    def collect(self, plan):
        self.most["fed"] = max(self.most["fed"], self.counts["feed"] - self.counts["collect"])
        self.most["started"] = max(self.most["started"], self.counts["start"] - self.counts["collect"])
        self._note("collect")
        self.steps.append(plan.step)
        images = self.decoder.collect(plan)
        if plan.step == self.fails_to_decode:
            raise DecodeError(f"of step {plan.step}")
        return images


@pytest.fixture(params=["cpu", "cuda"])
def spied(request, monkeypatch):
    """spied(**what fails) -> a loader of noise and its Spy, with the threads of either device."""

    def made(**fails):
        loader = train_loader(SyntheticIndex(IMAGES, classes=2), batch_size=BATCH, input_size=8)
        loader.prefetcher.decoder = Spy(loader.prefetcher.decoder, **fails)
        if request.param == "cuda":
            loader.worker = None
        return loader, loader.prefetcher.decoder

    return made


def test_who_does_what(spied):
    loader, spy = spied()
    assert [batch.indices.tolist() for batch in loader] == [
        batch.indices.tolist() for batch in train_loader(loader.index, batch_size=BATCH, input_size=8)
    ]
    consumer = "MainThread" if loader.worker is None else "fastdeit-loader_0"
    assert spy.threads == {"feed": {"fastdeit-feeder_0"}, "start": {consumer}, "collect": {consumer}}
    assert spy.steps == list(range(STEPS)) and set(spy.counts.values()) == {STEPS}
    assert spy.most["fed"] <= prefetch.FED + 1 and spy.most["started"] <= prefetch.PREFETCH + 1


def test_what_the_feeder_raises_is_raised_where_the_batch_is_wanted(spied):
    loader, spy = spied(fails_to_feed=5)
    seen = []
    with pytest.raises(ZeroDivisionError, match="of step 5"):
        for batch in loader:
            seen.append(batch)
    assert len(seen) == 5
    spy.fails_to_feed = None
    loader.set_epoch(0)
    assert len(list(loader)) == STEPS


def test_a_batch_that_cannot_be_decoded_is_tried_again_and_then_told(spied, monkeypatch):
    monkeypatch.setattr(prefetch.Prefetcher, "_decodes", lambda self, i: True)
    loader, spy = spied(fails_to_decode=3)
    with pytest.raises(RuntimeError, match="cannot be decoded, though each of its images can: of step 3"):
        list(loader)
    assert spy.steps.count(3) == prefetch.MAX_ATTEMPTS
    loader, spy = spied(fails_to_decode=3)
    monkeypatch.setattr(prefetch.Prefetcher, "_decodes", lambda self, i: setattr(spy, "fails_to_decode", None) or True)
    assert [int(step) for step, _ in enumerate(loader)] == list(range(STEPS))


def test_breaking_off_leaves_nothing_behind(spied):
    loader, spy = spied(fails_to_feed=5)
    assert len([batch for batch, _ in zip(loader, range(4))]) == 4  # what has failed ahead is not wanted any more
    spy.fails_to_feed = None
    first = next(iter(loader)).indices.tolist()
    again, *_ = loader
    assert again.indices.tolist() == first
    loader.load_state_dict({"position": 7})
    assert len(list(loader)) == STEPS - 7


def test_the_next_order_is_made_in_the_second_half_of_an_epoch(monkeypatch):
    made = []

    def order(n, **settings):
        made.append((settings["epoch"], threading.current_thread().name))
        return epoch_order(n, **settings)

    monkeypatch.setattr(plan, "epoch_order", order)
    monkeypatch.setattr(plan, "BLOCK", BATCH)
    plans = train_loader(SyntheticIndex(IMAGES, classes=2), batch_size=BATCH, input_size=8).plans
    assert plans.orders == {} and made == []  # an epoch may be set and never run
    for epoch in range(3):
        plans.set_epoch(epoch)
        drawn = [plans[step].indices for step in range(STEPS)]
        expected, _ = epoch_order(IMAGES, seed=0, epoch=epoch, repeats=3, global_batch=BATCH)
        assert np.array_equal(np.concatenate(drawn), expected)
        plans.orders[epoch + 1].result()
        assert [e for e, _ in made] == list(range(epoch + 2))
        assert plans.orders.keys() == {epoch, epoch + 1}
    assert {name for _, name in made} == {"fastdeit-order_0"}
    plans.set_epoch(9)
    for step in range(STEPS // 2):
        plans[step]
    assert plans.orders.keys() == {9}
    plans[STEPS // 2]
    assert plans.orders.keys() == {9, 10}


ABANDONED = """
from fastdeit.pipelines import SyntheticIndex, train_loader
loaders = [train_loader(SyntheticIndex(4096, classes=2), batch_size=4, input_size=8) for _ in range(2)]
loaders[1].worker = None
for batches in zip(*loaders):
    raise ZeroDivisionError("in the step")
"""


def test_a_process_that_ends_in_an_epoch_ends():
    ended = subprocess.run([sys.executable, "-c", ABANDONED], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1] == "ZeroDivisionError: in the step"


def test_images_of_shards_are_read_before_they_are_fed(tmp_path):
    """Not as pages of a file, which would be read while the GIL is held."""
    pytest.importorskip("nvidia.dali")
    import io
    import tarfile

    from PIL import Image

    from fastdeit.pipelines import open_index
    from fastdeit.pipelines.decode.graph import _sources

    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for name, contents in (("0.png", stream.getvalue()), ("0.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    index = open_index(tmp_path, "train")
    assert not index.encoded(0).flags.owndata
    (source,) = _sources(index, np.array([0]))
    assert source.flags.owndata and source.tobytes() == stream.getvalue()
