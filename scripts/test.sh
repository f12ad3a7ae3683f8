#!/usr/bin/env bash
# Installs into .venv what the tests need and runs ruff and all tests.
# Usage: bash scripts/test.sh [options of pytest]      e.g. -k sampler
set -eu
# shellcheck source=scripts/install.sh
. "$(dirname "$0")/install.sh" dev
ruff check .
ruff format --check .
# Two files side by side, one thread each: the tests are many small matrix products, which a second
# OpenMP thread only gets in the way of. In the order of their names: by default files of few tests,
# which are the long ones, come last, and one worker waits for the other.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
    -m "not (slurm and slow)" "$@"
