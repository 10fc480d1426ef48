# Sourced by quickstart.sh and test.sh: leaves a virtual environment with megatron_lite in $VENV.
#   PYTHON=         the interpreter to build it with (3.11 to 3.14; the first one found otherwise)
#   VENV=           where it lives (default: .venv in the repository); reused when it is up to date.
#                   VENV=active takes the Python on the PATH as it is, for containers that bring everything.
#   TORCH_VERSION=  the torch to install (2.13.0 to 2.14.1)

# The version that continuous integration runs on; a looser choice may bring gigabytes of CUDA packages.
TORCH_VERSION="${TORCH_VERSION:-2.13.0}"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3.14 python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "megatron_lite needs Python 3.11 to 3.14, and none was found. Install one, or say where: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

# ensure_environment [EXTRAS]: creates or updates $VENV; does nothing when nothing it depends on has changed.
ensure_environment() {
    local extras="${1:-}" stamp wanted python
    # Spinning OpenMP threads slow every process on a shared machine several times over.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    VENV="${VENV:-$REPO/.venv}"
    [ "$VENV" = active ] && return
    stamp="$VENV/.megatron_lite${extras:+-$extras}"
    wanted="torch==$TORCH_VERSION $(cksum < "$REPO/pyproject.toml") $REPO"
    if [ ! -x "$VENV/bin/python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if [ ! -x "$VENV/bin/python" ]; then
            python="$(find_python)" || return 1
            echo "Making a virtual environment in $VENV with $("$python" --version)"
            if ! "$python" -c "import ensurepip, venv" 2>/dev/null; then
                echo "$python cannot make virtual environments. On Debian and Ubuntu: apt-get install $(basename "$python")-venv" >&2
                return 1
            fi
            "$python" -m venv "$VENV" || return 1
        fi
        local install=("$VENV/bin/python" -m pip install --disable-pip-version-check)
        # Of torch's thousands of files a run imports a part, which is compiled when first imported. Where Python may
        # not write what it compiled, every import would compile it again.
        [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || install+=(--no-compile)
        if [ "$("$VENV/bin/python" -c 'import torch; print(torch.__version__.partition("+")[0])' 2>/dev/null)" != "$TORCH_VERSION" ]; then
            echo "Installing torch $TORCH_VERSION (once; with its CUDA libraries gigabytes are downloaded)"
            "${install[@]}" "torch==$TORCH_VERSION" || return 1
        fi
        echo "Installing megatron_lite${extras:+[$extras]} and what it needs"
        "${install[@]}" --quiet --quiet -e "$REPO${extras:+[$extras]}" || return 1
        echo "$wanted" > "$stamp"
    fi
    export PATH="$VENV/bin:$PATH"
}
