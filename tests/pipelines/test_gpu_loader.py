"""The loaders on a GPU: the graph that the other tests run on the CPU, and the memory it is handed over in."""

import pytest
import torch

from fastdeit.pipelines import Augmentation, eval_loader, train_loader

pytest.importorskip("nvidia.dali")
pytestmark = pytest.mark.gpu
CROP = Augmentation(aa="none", color_jitter=0)


def mean_differences(ours, theirs):
    """Per image, between batches of the two devices."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.images.is_cuda and a.images.is_contiguous() and a.labels.is_cuda and not a.indices.is_cuda
        assert torch.equal(a.indices, b.indices) and torch.equal(a.labels.cpu(), b.labels)
        if a.mix is not None:
            assert all(x.is_cuda and x.dtype == y.dtype and torch.equal(x.cpu(), y) for x, y in zip(a.mix, b.mix))
        yield (a.images.cpu().float() - b.images.float()).abs().mean((1, 2, 3))


@pytest.mark.parametrize(
    "augmentation, median",
    [(CROP, 1.0), (Augmentation(), 1.5), (Augmentation(aa="3aug"), 1.5), (Augmentation(aa="3aug", src=True), 1.5)],
)
def test_training_views_are_those_of_the_cpu(photos, augmentation, median):
    """Other decoder, other resize, and linear instead of cubic warps: equal up to a few levels."""
    settings = {"batch_size": 32, "augmentation": augmentation}
    on_gpu, on_cpu = train_loader(photos, device="cuda", **settings), train_loader(photos, **settings)
    assert torch.cat(list(mean_differences(on_gpu, on_cpu))).median() <= median


def test_evaluation_views_are_those_of_the_cpu(photos):
    on_gpu, on_cpu = (eval_loader(photos, batch_size=36, device=device) for device in ("cuda", "cpu"))
    assert torch.cat(list(mean_differences(on_gpu, on_cpu))).max() <= 1.5


def test_batches_that_are_kept_are_not_written_to_again(photos):
    loader = train_loader(photos, batch_size=8, device="cuda", input_size=64)
    kept = [(batch, batch.images.clone()) for batch in loader]
    for _ in range(3):
        for batch in loader:
            batch.images.float().mean()
    torch.cuda.synchronize()
    assert all(torch.equal(batch.images, copy) for batch, copy in kept)


def test_a_batch_let_go_early_is_not_overwritten_before_its_work_is_done(photos):
    """The work on a batch is queued behind a long kernel, and the batch dropped at once."""
    loader = train_loader(photos, batch_size=8, device="cuda", input_size=64, seed=4)
    expected = [batch.images.long().sum().item() for batch in loader]
    sums = []
    for batch in loader:
        torch.cuda._sleep(200_000_000)
        sums.append(batch.images.long().sum())
        del batch
    assert [total.item() for total in sums] == expected


def test_on_another_stream(photos):
    expected = [batch.images.long().sum().item() for batch in train_loader(photos, batch_size=32, device="cuda")]
    with torch.cuda.stream(torch.cuda.Stream()):
        found = [batch.images.long().sum().item() for batch in train_loader(photos, batch_size=32, device="cuda")]
    assert found == expected


def test_neither_batch_size_nor_threads_matter(photos):
    """Which they do where a batch is shared between the hardware decoder and another one."""

    def images(batch_size, num_threads):
        augmentation = Augmentation(repeats=1)
        settings = {"batch_size": batch_size, "num_threads": num_threads, "augmentation": augmentation}
        loader = train_loader(photos, device="cuda", **settings)
        return {int(i): image for batch in loader for i, image in zip(batch.indices, batch.images)}

    small, large = images(8, 1), images(32, 4)
    assert small.keys() == large.keys() and all(torch.equal(small[i], large[i]) for i in small)
