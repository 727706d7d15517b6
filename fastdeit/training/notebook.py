"""A progress bar in a notebook: one output, written again and again; no widgets, which not every notebook shows."""

import html
import sys
import time
from typing import Any


def in_notebook() -> bool:
    """Whether this program runs in a notebook's kernel: Jupyter, Colab, VS Code."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class NotebookBar:
    """The part of rich.progress.Progress that a Log uses."""

    def __init__(self) -> None:
        self.text, self.left, self.total, self.completed = "", "", 1, 0
        self.output: Any = None
        self.started = time.monotonic()

    def add_task(self, description: str, total: int, left: str) -> int:
        self.text, self.total, self.left = description, total, left
        return 0

    def start(self) -> None:
        from IPython.display import display

        self.started = time.monotonic()
        self.output = display(self._shown(), display_id=True)

    def update(self, task: int, *, completed: int, left: str, description: str | None = None) -> None:
        self.completed, self.left, self.text = completed, left, description or self.text
        if self.output is not None:
            self.output.update(self._shown())

    def stop(self) -> None:
        if self.output is not None:
            self.output.update(self._shown())
            self.output = None

    def _shown(self) -> Any:
        from IPython.display import HTML

        seconds = int(time.monotonic() - self.started)
        text = f"{self.completed}/{self.total}  {seconds // 60}:{seconds % 60:02d}  left {self.left}  {self.text}"
        return HTML(f'<progress value="{self.completed}" max="{self.total}"></progress> {html.escape(text)}')
