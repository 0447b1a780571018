#!/usr/bin/env bash
# Writes the image's lists of packages again, each by version and hash: every one that setup.cfg's ranges bring with the extras `optuna` and
# `track`, for Python 3.11 on x86_64 Linux. Needs uv (pip install uv) and the two indices. Look at the difference, and run the tests with those versions.
set -euo pipefail
cd "$(dirname "$0")"

locked() {  # the packages that it reads from standard input, or from files, with their hashes
    uv pip compile "$@" --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate --quiet
}
of() {      # the entries, with their hashes, of the packages whose names match (`! ` before: do not match)
    awk -v names="$1" -v but="${2:-}" '/^[a-z0-9]/ {split($1, part, "=="); hit = part[1] ~ ("^(" names ")$")} (but == "" ? hit : !hit)'
}

cuda='torch|triton|cuda-.*|nvidia-.*'
everything=$(printf 'setuptools>=80\nwheel\n' | locked - ../../setup.cfg --extra optuna --extra track --only-binary :all: --no-binary deepspeed)
of "$cuda|deepspeed" not <<< "$everything" > common.txt   # wheels alone
of deepspeed <<< "$everything" > source.txt               # its index has no wheel
of "$cuda" <<< "$everything" > gpu.txt                    # PyPI's torch, and the CUDA libraries that it brings
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' gpu.txt)
cpu=https://download.pytorch.org/whl/cpu
{ echo "--extra-index-url $cpu"; locked - --no-deps --index-url "$cpu" <<< "torch==$torch+cpu"; } > cpu.txt
