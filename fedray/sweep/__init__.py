"""`fedray sweep`: many federated runs under Ray Tune, each with its own coordinator and workers in its trial's
placement group.

A space is a Python file that holds one `Sweep` under the name SWEEP (see `tune_spaces/`). Every trial is an ordinary
run directory under `OUT/trials`, so a trial that is repeated, by Tune or by `--resume`, goes on from its own
checkpoint, and any trial can be evaluated, exported or rerun alone.

`space` is what a person writes, `trials` what follows from it, `budget` and `resources` what is checked before
anything runs, `trial` what runs in a trial's process, `tuning` how Tune is set up, `folder` what lies on disk, and
`run` all of it in order.
"""

from fedray.sweep.space import Sweep

__all__ = ["Sweep"]
