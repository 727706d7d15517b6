"""What test_child.py and test_probe.py call in a process of their own."""

import os
import signal
import sys
import time


def twice(x):
    return 2 * x


def raises():
    raise LookupError("no such\n  thing")


def crashes():
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs():
    time.sleep(600)


def leaves(code):
    print("the last words", file=sys.stderr, flush=True)
    os._exit(code)


def process():
    return os.getpid()


def variable(name):
    return os.environ.get(name)


# ---------------------------------------------------------------------------------------------------------------------
# In place of a GPU's decoders: called as decode/probe.py's `decode`


def right(decoding, samples, pixels, device_id, num_threads):
    from fastdeit.pipelines.decode import probe

    return probe.decode(decoding, samples, pixels, device_id, num_threads)


def moved_by_a_pixel(decoding, samples, pixels, device_id, num_threads):
    from fastdeit.pipelines.decode import probe

    right(decoding, samples, pixels, device_id, num_threads)
    images = probe.read_images(pixels)
    probe.write_images(pixels, [image[:, [*range(1, image.shape[1]), 0]] for image in images])


def crashes_in_decoding(*_):
    crashes()


def hangs_in_decoding(*_):
    hangs()


def raises_in_decoding(*_):
    raise RuntimeError("nvImageCodec failure: '#8'")


def cannot_enter(*_):
    from fastdeit.pipelines.decode import probe

    raise RuntimeError(probe.ALONE)


def is_not_here():
    from fastdeit.doctor.tries import NotHere

    raise NotHere("of another kind")
