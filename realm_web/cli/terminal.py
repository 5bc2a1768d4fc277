"""What commands write for people: the load progress bar, notes on stderr, tables."""

import sys
from collections.abc import Collection, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from realm_web.cli.text import human_bytes, visible

if TYPE_CHECKING:
    from realm_web import opening

PIPED_WIDTH = 200  # characters
STAGES = {"download": "downloading", "load": "loading weights", "compile": "compiling kernels"}


def note(text: str, *, style: str = "dim") -> None:
    """One line on stderr, dimmed where stderr is a terminal."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(text, style=style))


class Output:
    """stdout for people: lines of any length, and tables that are wide when piped, so that nothing is cut."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)

    def line(self, text: str = "", *, style: str = "") -> None:
        self._console.print(Text(visible(text), style=style), soft_wrap=True)

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()
    ) -> None:
        """Rows of text under bold headings, then an empty line; the columns in `right` are right-aligned."""
        shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for column in columns:
            shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            shown.add_row(*(Text(visible(cell)) for cell in row))
        self._console.print(shown)
        self._console.print()


class _Amount(ProgressColumn):
    """Bytes done, total and rate for a transfer; done and total for pipelines."""

    def render(self, task: Task) -> Text:
        done, total = int(task.completed), int(task.total or 0)
        if task.fields["stage"] == "compile":
            return Text(f"{done}/{total}")
        rate = f"  {human_bytes(task.speed)}/s" if task.speed else ""
        return Text(f"{human_bytes(done)} of {human_bytes(total)}{rate}")


class LoadProgress:
    """Bars for `Engine.open(on_progress=...)`, one per stage; gone at the end, absent without a terminal."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _Amount(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, progress: "opening.Progress") -> None:
        name = progress.stage
        if name in ("room", "tune"):  # a word about the KV cache, or why it takes longer this once
            if not self._bars.disable:
                self._bars.console.print(Text(progress.label, style="dim"))
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(STAGES[name], total=progress.total, stage=name)
        self._bars.update(self._tasks[name], completed=progress.done, total=progress.total)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


class WorkProgress:
    """One bar on stderr for work of `total` pieces (None: not known); absent without a terminal.

    It appears when it is first shown something, so that others may come before it.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bars.add_task(what, total=total, text="")

    def show(self, done: int, text: str) -> None:
        """`text` says in words how far it is and how quick."""
        self._bars.start()
        self._bars.update(self._task, completed=done, text=text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
