"""`fedray compare`: several methods and seeds on the same partitions and the same budget of examples, one table and
one picture.

The learning rate is tuned for each method by a small grid on a validation split (`data.evaluate_on validation`: the
source's own, or one carved out of the training examples), never on the examples of the final metric: tuned rates
bring most variants of LoRA within one or two percent of each other, so that a comparison at one rate for all says
little about the methods. Every run is an ordinary run directory under `--out`; a finished one is not repeated and one
that was cut off is resumed, so a comparison can be stopped and started at will.
"""

from fedray.compare.comparison import compare

__all__ = ["compare"]
