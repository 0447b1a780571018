"""What fedray's own parts cost, as ratios measured in one run, with medians.

    python jobs/bench.py                # all of it
    python jobs/bench.py aggregation    # factored against dense, 4096 x 4096, 10 clients, rank 16
    python jobs/bench.py cohorts        # an aggregation's cost a client with 10, 100 and 1,000 of them
    python jobs/bench.py overhead       # what a trivial client costs; --peer-python PATH: beside Flower, pfl-research
    python jobs/bench.py step           # a DeepSpeed client step against the same loop in plain PyTorch
    python jobs/bench.py memory         # a step's memory in each setting of the model, against a plain PEFT loop
    python jobs/bench.py abba           # ABBA's memory and step against LoRA's at equal parameters, and LoHa's
    python jobs/bench.py privacy        # a DP-SGD step against the plain step
    python jobs/bench.py secure         # a client's bytes and time in secure sums of 50, 100 and 200, a third dropping
    python jobs/bench.py sharing        # what a sweep's trials on one machine share: tokenised data and base weights
    python jobs/bench.py run            # a run against the same steps in a plain PyTorch loop; takes a run's flags
    python jobs/bench.py model          # a whole Llama-3.2-1B: 10 clients of rank 16; --clients, --shape

Times in seconds are this machine's; the ratios are what is claimed. Run it on a quiet machine.
"""

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory says when it starts and stops

from benches.abba import abba
from benches.aggregation import aggregation
from benches.cohorts import cohorts
from benches.overhead import overhead
from benches.passes import memory
from benches.privacy import private
from benches.secure_sums import secure
from benches.sharing import sharing
from benches.step import step
from benches.whole_model import whole_model
from benches.whole_run import whole_run
from rich.console import Console

from fedray.report.terminal import make_console


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("all", *BENCHES), default="all")
    parser.add_argument("--size", type=int, default=4096, help="m = n of the aggregation")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the step and abba benchmarks")
    parser.add_argument(
        "--shape", default="llama-3.2-1b", help="of the whole model: a shape that ships with fedray, or a model"
    )
    parser.add_argument("--clients", type=int, help="of the whole model (10), and of the overhead (100)")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="PATH", help="of an environment with flwr or pfl; repeat"
    )
    args, flags = parser.parse_known_args()
    if flags and args.part not in ("sharing", "run"):
        parser.error(f"unknown: {' '.join(flags)} (only `sharing` and `run` take a run's own flags)")
    console = make_console(width=150)
    for name in BENCHES if args.part == "all" else (args.part,):
        BENCHES[name](console, args, flags)


BENCHES: dict[str, Callable[[Console, argparse.Namespace, list[str]], None]] = {
    "aggregation": lambda console, args, _: aggregation(console, args.size, args.size, clients=10, rank=16),
    "cohorts": lambda console, args, _: cohorts(console),
    "overhead": lambda console, args, _: overhead(console, args.peer_python, args.clients or 100),
    "step": lambda console, args, _: step(console, args.rounds),
    "memory": lambda console, args, _: memory(console),
    "abba": lambda console, args, _: abba(console, args.rounds),
    "privacy": lambda console, args, _: private(console, args.rounds),
    "secure": lambda console, args, _: secure(console),
    "sharing": lambda console, _, flags: sharing(console, flags),
    "run": lambda console, _, flags: whole_run(console, flags),
    "model": lambda console, args, _: whole_model(console, args.shape, args.clients or 10, 16),
}

if __name__ == "__main__":
    main()
