"""Progress bar of a terminal: one line of numbers, and the words below it.

:func:`skillnet_platform.console.show_progress` draws it. The numbers must stay visible on every
terminal, so a long label and the bar give way to them.
"""

from collections.abc import Iterable

from rich import progress
from rich.console import Console, RenderableType
from rich.table import Column
from rich.text import Text

from skillnet_platform.table_layout import wrap_words
from skillnet_platform.terminal_text import NO_BREAK_SPACE

#: Columns of a terminal for the bar, the counts, the rate and the remaining time.
COLUMNS_OF_NUMBERS = 60
#: Columns of the shortest label.
LEAST_LABEL = 12


class TerminalBar(progress.Progress):
    """Bar with step, rate and remaining time; losses or file names are below it.

    All texts are without control characters.

    Args:
        label: activity.
        total: number of units; ``None`` if unknown.
        done: units of an earlier run.
    """

    def __init__(self, label: str, total: int | None, done: int) -> None:
        self._words = ""
        screen = Console(stderr=True)
        room = max(screen.width - COLUMNS_OF_NUMBERS, LEAST_LABEL)
        label_column = Column(no_wrap=True, overflow="ellipsis", max_width=room)
        super().__init__(
            # Brackets in the name of a file are no markup.
            progress.TextColumn("{task.description}", markup=False, table_column=label_column),
            progress.BarColumn(None, table_column=Column(ratio=1)),
            progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
            # Rich forgets steps after 30 s, so slow runs would have no remaining time.
            progress.TextColumn("{task.fields[speed]}", markup=False),
            console=screen,
        )
        self._number = self.add_task(label, total=total, completed=done, speed="")

    def show(self, done: int, speed: str, words: str) -> None:
        """Show the number of finished units, rate and remaining time, and some words."""
        self._words = words
        self.update(self._number, completed=done, speed=speed)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the line of numbers, and the words if there are any."""
        yield from super().get_renderables()
        if self._words:
            # A line ends between two losses, not between a task and its loss.
            phrases = (part.replace(" ", NO_BREAK_SPACE) for part in self._words.split(", "))
            for line in wrap_words(", ".join(phrases), self.console.width):
                yield Text(line, no_wrap=True, overflow="ellipsis")
