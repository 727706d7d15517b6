"""SIGTERM, SIGINT and SIGUSR1: leave in order, and at once where nothing would be lost.

A Python handler runs only when the main thread comes back to the interpreter, which it does not while it waits for the
GPU, for other processes or for a compiler. So a thread of its own listens: the interpreter's C code writes every
signal's number to a pipe (signal.set_wakeup_fd) the moment it arrives.

- While steps run (`polled`), the first signal is only noted: the trainer looks at `received` after each step,
  saves and leaves.
- At any other time (indexing, compiling the first step, evaluation, pictures) nothing would be lost, and the process
  ends then and there, having waited for a checkpoint that is being written.
- A second signal ends it at once. What comes within a second of the first counts as the same: Ctrl-C, torchrun and
  SLURM may each pass it on.

The exit code is 128 + the signal's number. Threads of the loader need no care: signals do not end them, the end of the
process does.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from fastdeit.errors import tell

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME = 1.0  # seconds


class Stop:
    """What this process has been told by signals. Listens between `__enter__` and `__exit__`, which the main thread
    calls; in another thread it does nothing."""

    def __init__(self):
        self.received: int | None = None
        self.before_exit: Callable[[], None] | None = None  # waits for what is being written
        self.last_words: Callable[[], str] | None = None  # what is saved, and how it is resumed
        self.polled = False
        self._former: dict = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._former_descriptor = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(self._pipe[0],), name="fastdeit-signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if not self._former:
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_descriptor)
        self._former = {}
        os.close(self._pipe[1])  # the thread reads the end of the pipe, and ends

    def _note(self, number: int, *_) -> None:
        self.received = self.received or number

    def _listen(self, pipe: int) -> None:
        first = None
        while content := os.read(pipe, 1):
            number = content[0]
            if number not in SIGNALS:
                continue
            self._note(number)
            if first is None:
                first = time.monotonic()
                name = signal.Signals(number).name
                if self.polled:
                    tell(f"{name}: finishing this step, then saving; a second one ends at once")
                else:
                    tell(f"{name}: ending")
                    threading.Thread(target=self.leave, daemon=True).start()
            elif time.monotonic() - first > SAME:
                os._exit(128 + number)
        os.close(pipe)

    def leave(self, number: int | None = None) -> None:
        """End the process, having waited for what is being written. number: of the signal, if it came to another
        process."""
        if self.before_exit is not None:
            self.before_exit()
        if self.last_words is not None and (words := self.last_words()):
            tell(words)
        sys.stdout.flush()
        for stream in (sys.__stdout__, sys.__stderr__):  # the terminal's own, not what a progress bar puts before them
            if stream.isatty():
                stream.write("\x1b[?25h")  # a progress bar hides the cursor
                stream.flush()
        # Without unwinding: the main thread may be waiting for something that never comes.
        os._exit(128 + (self.received or number))
