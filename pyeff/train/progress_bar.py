"""A progress bar on a terminal, and nothing elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """What the training loop tells about its course."""

    def __init__(self, progress: Progress | None, total: int, done: int) -> None:
        self._progress = progress
        self._id = progress.add_task("training", total=total, completed=done) if progress else None

    def advance(self, text: str) -> None:
        """One step more."""
        if self._progress is not None and self._id is not None:
            self._progress.update(self._id, advance=1, description=text)

    def tell(self, text: str) -> None:
        """What goes on within a step."""
        if self._progress is not None and self._id is not None:
            self._progress.update(self._id, description=text)

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)


@contextmanager
def progress_bar(total: int, done: int, shown: bool) -> Iterator[Bar]:
    """A bar over the steps of a run.

    Args:
        total: steps in all.
        done: steps done before.
        shown: whether this process may show it; it is shown on a terminal only.

    Yields:
        The bar.
    """
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield Bar(None, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, total, done)
