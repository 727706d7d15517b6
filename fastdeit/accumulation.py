"""A batch in parts that go through the model one after another, for one step of the optimizer (--accumulate).

The loader hands over the whole batch of the step, so the images, their mixing and the dropped paths of a step are the
same however it is split: into parts of one process, or over processes.
"""

from fastdeit.pipelines import Batch, Mix


def split(batch: Batch, parts: int) -> list[Batch]:
    """`parts` batches of equal size. Mixing pairs neighbours, so a part of even size holds its samples' partners."""
    if parts == 1:
        return [batch]
    size = len(batch.labels) // parts
    return [_part(batch, start, start + size) for start in range(0, parts * size, size)]


def _part(batch: Batch, start: int, end: int) -> Batch:
    mix = batch.mix
    if mix is not None:
        mix = Mix(*(tensor[start:end] for tensor in mix))
        mix = mix._replace(partner=mix.partner - start)
    part = Batch(batch.images[start:end], batch.labels[start:end], batch.indices[start:end], mix)
    if not hasattr(batch, "answers"):
        return part
    answers = batch.answers  # a stored teacher's
    several = isinstance(answers, tuple)
    return type(batch)(*part, tuple(a[start:end] for a in answers) if several else answers[start:end])
