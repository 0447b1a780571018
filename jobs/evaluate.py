"""Held-out metrics of a run's last state, as a job of a cluster.

ray job submit --working-dir . -- python jobs/evaluate.py RUN_DIR [--json]
"""

import sys

from fedray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
