import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit.pipelines import Augmentation, Repeated, WithUnlabelled, open_folder, open_index, train_loader

SIZE = 16


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIZE, SIZE, 3), value, np.uint8)).save(path)


@pytest.fixture
def data(tmp_path):
    for value, name in ((10, "train/a/0.png"), (20, "train/a/1.png"), (30, "train/b/0.png")):
        write(tmp_path / "data" / name, value)
    for number in range(5):
        write(tmp_path / "more" / f"deep/{number}.png", 100 + number)
    return tmp_path


@pytest.fixture
def index(data):
    return WithUnlabelled(open_index(data / "data", "train"), open_folder(data / "more"))


def test_labels_follow_and_the_rest_has_none(index, data):
    assert len(index) == 8 and index.classes == ("a", "b")
    assert index.labels.tolist() == [0, 0, 1, -100, -100, -100, -100, -100]
    assert index.heights.tolist() == index.widths.tolist() == [SIZE] * 8
    assert index.name(2).endswith("b/0.png") and index.path(3) == str(data / "more/deep/0.png")
    assert (index.encoded(7) == np.fromfile(data / "more/deep/4.png", np.uint8)).all()


def test_the_loader_gives_each_image_with_its_label(index):
    pytest.importorskip("nvidia.dali")
    plain = Augmentation(
        scale=(1, 1), ratio=(1, 1), hflip=0, aa="none", color_jitter=0, reprob=0, mixup=0, cutmix=0, repeats=1
    )
    loader = train_loader(index, batch_size=4, input_size=SIZE, augmentation=plain, num_threads=1)
    seen = {}
    for batch in loader:
        for image, label, i in zip(batch.images, batch.labels.tolist(), batch.indices.tolist()):
            seen[i] = (int(image.float().mean()), label)
    assert seen == {i: (value, index.labels[i]) for i, value in enumerate([10, 20, 30, 100, 101, 102, 103, 104])}
    assert torch.tensor([label for _, label in seen.values()]).eq(-100).sum() == 5


def test_images_come_again_one_after_another(data):
    labelled = open_index(data / "data", "train")
    index = Repeated(labelled, 8)
    assert len(index) == 8 and index.classes == ("a", "b") and index.bad == ()
    assert index.places.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]  # of three, eight times: floor(3 i / 8)
    assert index.labels.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert index.heights.tolist() == index.widths.tolist() == [SIZE] * 8
    assert index.name(7) == labelled.name(2) and index.path(3) == labelled.path(1)
    assert index.encoded_bytes.tolist() == [labelled.encoded_bytes[place] for place in index.places]
    assert (index.encoded(5) == labelled.encoded(1)).all()
    assert len({index.fingerprint, labelled.fingerprint, Repeated(labelled, 9).fingerprint}) == 3


def test_what_comes_again_is_augmented_differently(data):
    pytest.importorskip("nvidia.dali")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(
        data / "data/train/b/0.png"
    )
    index = Repeated(open_index(data / "data", "train"), 8)
    crops = Augmentation(scale=(0.1, 0.9), hflip=0.5, aa="none", color_jitter=0, reprob=0, mixup=0, cutmix=0, repeats=1)
    (batch,) = train_loader(index, batch_size=8, input_size=SIZE, augmentation=crops, num_threads=1)
    views = {i: image for i, image in zip(batch.indices.tolist(), batch.images)}
    assert not torch.equal(views[6], views[7]) and index.places[6] == index.places[7]


def test_a_part_in_shards_makes_all_be_read_as_bytes(data):
    import io
    import tarfile

    with tarfile.open(data / "shards-train-0.tar", "w") as tar:
        for name, content in (("x.png", (data / "data/train/a/0.png").read_bytes()), ("x.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    mixed = WithUnlabelled(open_index(data, "train"), open_folder(data / "more"))
    assert mixed.path(0) is None and mixed.path(3) is None
    assert (mixed.encoded(3) == np.fromfile(data / "more/deep/2.png", np.uint8)).all()


def test_the_fingerprint_knows_both(index, data):
    before = index.fingerprint
    write(data / "more/deep/9.png", 3)
    after = WithUnlabelled(index.parts[0], open_folder(data / "more")).fingerprint
    assert before != after != index.parts[0].fingerprint
