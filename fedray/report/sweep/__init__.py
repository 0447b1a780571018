"""What a sweep found: one tidy table, what cannot be improved without giving something up, which knob mattered, and
pictures of each.

Everything is read from the run directories, so it can be made again at any time, of an unfinished sweep too.
"""

from fedray.report.sweep.write import write_sweep

__all__ = ["write_sweep"]
