"""Many runs under Ray Tune, as a job of a cluster.

ray job submit --working-dir . -- python jobs/sweep.py --space tune_spaces/ranks_methods.py ...
"""

import sys

from fedray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
