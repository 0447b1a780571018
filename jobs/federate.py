"""One federated run, as a job of a cluster.

ray job submit --working-dir . -- python jobs/federate.py --config F.yaml [--section.key value ...]
"""

import sys

from fedray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
