# Sourced by quickstart.sh and test.sh: leaves a virtual environment with megatron_lite in $VENV.
#   PYTHON=  the interpreter to build it with (3.11 or 3.12; the first one found otherwise)
#   VENV=    where it lives (default: .venv in the repository); reused when it is up to date.
#            VENV=active takes the Python on the PATH as it is, for containers that bring everything.

TORCH_VERSION=2.13.0 # the version the tests run on; a looser choice may bring gigabytes of CUDA packages

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "megatron_lite needs Python 3.11 or 3.12, and none was found. Install one, or say where: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

# ensure_environment EXTRAS: creates or updates $VENV; does nothing when nothing it depends on has changed.
ensure_environment() {
    local extras="$1" stamp wanted python
    # Spinning OpenMP threads slow every process on a shared machine several times over.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    VENV="${VENV:-$REPO/.venv}"
    [ "$VENV" = active ] && return
    stamp="$VENV/.megatron_lite-$extras"
    wanted="torch==$TORCH_VERSION $(cksum < "$REPO/pyproject.toml") $REPO"
    if [ ! -x "$VENV/bin/python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if [ ! -x "$VENV/bin/python" ]; then
            python="$(find_python)" || return 1
            echo "Making a virtual environment in $VENV with $("$python" --version)"
            "$python" -m venv "$VENV" || return 1
        fi
        echo "Installing torch $TORCH_VERSION and megatron_lite[$extras] (once; a minute or two)"
        if ! "$VENV/bin/python" -c "import torch" 2>/dev/null; then
            "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$TORCH_VERSION" || return 1
        fi
        "$VENV/bin/python" -m pip install --quiet --quiet --disable-pip-version-check -e "$REPO[$extras]" || return 1
        echo "$wanted" > "$stamp"
    fi
    export PATH="$VENV/bin:$PATH"
}
