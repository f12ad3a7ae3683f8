# Sourced by the scripts here: makes .venv once, installs the package with the extras in $1, and
# activates it. A second call with nothing changed installs nothing.
extras=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "Python 3.10 or later is needed, not $("$python" --version); set PYTHON=/path/to/python" >&2
    exit 2
fi
[ -d .venv ] || "$python" -m venv .venv
# shellcheck disable=SC1091
. .venv/bin/activate
wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)-$extras
if [ "$(cat ".venv/installed-${extras:-plain}" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into .venv (a few minutes the first time) ..."
    pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
    pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".${extras:+[$extras]}"
    echo "$wanted" > ".venv/installed-${extras:-plain}"
    echo "Installed; \`. .venv/bin/activate\` puts restem on the PATH of your shell, too."
fi
