"""The one place where a terminal's console is made: what is printed is words, never rich's markup.

Client names, paths and errors come from others: with markup on, a client named `[/red]x` ends a run.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

#: Control characters as people write them; the terminal would obey them. A new line and a tabulator are no harm.
_SHOWN = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Words(Console):
    """Every string that is printed, in tables and bars too, passes `render_str`."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(text.translate(_SHOWN), **options)


def make_console(**options: Any) -> Console:
    """A `rich.console.Console` with these options that shows every string as it is: neither markup nor emoji codes nor
    control characters mean anything in it, and no number is coloured. Colours are asked for by `style`."""
    return _Words(**options, markup=False, emoji=False, highlight=False)
