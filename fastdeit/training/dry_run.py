"""--dry-run: two steps on the first batch, then memory and shapes on the terminal; nothing is written."""

import resource
import time

import torch


def dry_run(loop) -> dict:
    """Take the steps and say what they took. Returns an empty summary."""
    trainer = loop.trainer
    trainer.model.train()
    loop.train_loader.set_epoch(0)
    batch = next(iter(loop.train_loader))
    losses, seconds = [], []
    for _ in range(2):
        start = time.perf_counter()
        losses.append(trainer.step(batch).tolist()[0])
        seconds.append(time.perf_counter() - start)
    on_cuda = trainer.world.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say = loop.log.say
    say(f"device            {trainer.world.device}, {trainer.world.world_size} process(es), {trainer.precision}")
    say(f"student           {sum(p.numel() for p in trainer.model.parameters()):,} parameters")
    say(
        f"first batch       images {tuple(batch.images.shape)} {batch.images.dtype}, labels {tuple(batch.labels.shape)}"
    )
    say(f"student's input   {tuple(trainer.prepare(batch).shape)} {trainer.precision}")
    say(f"two steps         loss {losses[0]:.4f}, {losses[1]:.4f}; {seconds[0]:.2f} s, {seconds[1]:.2f} s")
    say(f"peak memory       {peak / 2**20:,.0f} MiB {'on the device' if on_cuda else 'of the process'}")
    loop.log.close()
    return {}
