#!/usr/bin/env bash
# Installs into .venv and runs ReST^EM on the embedded model: a few minutes on 2 CPU cores.
# Usage: bash scripts/quickstart.sh [options of `restem fit`]      e.g. --seed_everything 1
# A second call shows the finished run; delete runs/quickstart to run it anew.
set -eu
# shellcheck source=scripts/install.sh
. "$(dirname "$0")/install.sh" ""
exec restem fit --config configs/quickstart.yaml "$@"
