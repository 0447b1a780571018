"""Several methods and seeds, as a job of a cluster.

ray job submit --working-dir . -- python jobs/compare.py --methods fedit,fedex --config F.yaml ...
"""

import sys

from fedray.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
