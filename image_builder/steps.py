"""Tells what goes on: a port that the work reports to, and two ways to show it. Nothing else here prints.

At a terminal each long step is a bar that follows the file it writes; elsewhere it is a line with its duration.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Steps(Protocol):
    """What the work reports to."""

    def step(
        self, text: str, *, watch: Path | None = None, expected_bytes: int | None = None
    ) -> AbstractContextManager[None]:
        """Shows a step while its context is open.

        Args:
            text: what is done, as a phrase.
            watch: the file that grows meanwhile.
            expected_bytes: about how large it will be on disk; None where nobody knows.
        """
        ...

    def note(self, text: str) -> None:
        """Shows a sentence that the user should know."""
        ...


class Silent:
    """Shows nothing."""

    def step(
        self, text: str, *, watch: Path | None = None, expected_bytes: int | None = None
    ) -> AbstractContextManager[None]:
        """Shows nothing."""
        del text, watch, expected_bytes
        return contextlib.nullcontext()

    def note(self, text: str) -> None:
        """Shows nothing."""


class Lines:
    """One line for each step when it is done: for logs of pipelines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextlib.contextmanager
    def step(self, text: str, *, watch: Path | None = None, expected_bytes: int | None = None) -> Iterator[None]:
        """Writes `text` and how long it took; nothing about a step that failed, whose error tells more."""
        del watch, expected_bytes
        began = time.monotonic()
        yield
        self.note(f"{text}: {time.monotonic() - began:.1f} s")

    def note(self, text: str) -> None:
        """Writes a line."""
        self._stream.write(f"{text}\n")
        self._stream.flush()


class _Watching(Progress):
    """A progress display that looks at the watched files whenever it draws itself."""

    def __init__(self, console: Console) -> None:
        self.watched: dict[TaskID, Path] = {}
        super().__init__(
            TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn(), console=console
        )

    def get_renderable(self) -> RenderableType:
        for task, path in list(self.watched.items()):
            with contextlib.suppress(OSError):
                self._move(task, path.stat().st_blocks * 512)
        return super().get_renderable()

    def _move(self, task: TaskID, size: int) -> None:
        """Moves a bar, never quite to its end: only the step itself knows that it is done."""
        found = next((one for one in self.tasks if one.id == task), None)
        if found is not None and found.total is not None:
            found.completed = min(float(size), found.total * 0.99)


class Bars:
    """A bar for each step, for a terminal. Use as a context."""

    def __init__(self, console: Console) -> None:
        self._progress = _Watching(console)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextlib.contextmanager
    def step(self, text: str, *, watch: Path | None = None, expected_bytes: int | None = None) -> Iterator[None]:
        """Shows a bar that follows `watch`, or one that only moves."""
        task = self._progress.add_task(text, total=expected_bytes if watch is not None else None)
        if watch is not None:
            self._progress.watched[task] = watch
        try:
            yield
            self._progress.update(task, total=1, completed=1)
        finally:
            self._progress.watched.pop(task, None)

    def note(self, text: str) -> None:
        """Writes a line above the bars."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def shown(stream: TextIO) -> Iterator[Steps]:
    """Gives bars where `stream` is a terminal, else lines."""
    if not stream.isatty():
        yield Lines(stream)
        return
    with Bars(Console(file=stream)) as bars:
        yield bars
