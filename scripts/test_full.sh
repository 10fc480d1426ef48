#!/usr/bin/env bash
# scripts/test.sh --full: everything that can be tested on this machine, in some hours. Arguments go to the first pytest.
#   1. the checks of scripts/test.sh, with all layouts and the tests marked full
#   2. the unit tests and a part of the parallel ones on the other Pythons, and on the other versions of torch
#   3. the tests of SLURM jobs, tests/slurm/run.sh
# What is not there is skipped, and the table at the end says so. Logs and environments are kept in .full; delete it to
# start over.
set -uo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$REPO"
FOLDER="$REPO/.full"
mkdir -p "$FOLDER"
PYTHONS=(3.11 3.12 3.13 3.14)
TORCHES=(2.13.0 2.14.1)
PART=(tests/unit tests/parallel/test_tensor_parallel.py tests/parallel/test_data_parallel.py tests/parallel/test_pipeline.py
    tests/parallel/test_checkpoint.py tests/e2e/test_quickstart.py)
TABLE=()
STATUS=0

# note NAME RESULT [WHY]: a row of the table.
note() { TABLE+=("$(printf '%-28s %-8s %s' "$1" "$2" "${3:-}")"); }

# check NAME COMMAND...: runs it, on the screen and in a log, and notes how it ended.
check() {
    local name="$1" log started=$SECONDS
    log="$FOLDER/${name//[^[:alnum:].]/_}.log"
    shift
    printf '\n== %s (%s s so far)\n' "$name" "$SECONDS"
    if "$@" 2>&1 | tee "$log"; then
        note "$name" passed "$((SECONDS - started)) s; $(grep -E '[0-9]+ passed' "$log" | tail -n 1)"
    else
        note "$name" FAILED "$((SECONDS - started)) s; see $log"
        STATUS=1
    fi
}

# find_version X.Y: the interpreter of that version, if it is there.
find_version() {
    local candidate
    for candidate in "${PYTHON:-}" "python$1" python3; do
        if [ -n "$candidate" ] && "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# in_environment PYTHON TORCH COMMAND...: in the environment of these two, which is made if it is not there.
in_environment() (
    PYTHON="$1" TORCH_VERSION="$2" VENV="$FOLDER/venv-$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-$2"
    shift 2
    source scripts/environment.sh
    ensure_environment dev || exit 1
    "$@"
)

# variant X.Y TORCH: the part of the tests on these versions, or why not.
variant() {
    local name="Python $1, torch $2" python log="$FOLDER/install-$1-$2.log"
    if ! python="$(find_version "$1")"; then
        note "$name" skipped "no python$1 on this machine"
        return
    fi
    printf '\n== %s: installing (%s s so far)\n' "$name" "$SECONDS"
    if ! in_environment "$python" "$2" true > "$log" 2>&1; then
        note "$name" skipped "cannot be installed here: $(grep -v '^WARNING' "$log" | tail -n 1)"
        return
    fi
    check "$name" in_environment "$python" "$2" python -m pytest -n 3 --dist loadfile "${PART[@]}"
}

check "all checks" scripts/test.sh --full-matrix "$@"
source scripts/environment.sh
OWN="$(VENV="${VENV:-$REPO/.venv}"; [ "$VENV" = active ] || PATH="$VENV/bin:$PATH"
    python -c 'import sys, torch; print("%d.%d" % sys.version_info[:2], torch.__version__.partition("+")[0])')"
read -r OWN_PYTHON OWN_TORCH <<< "$OWN"
for python in "${PYTHONS[@]}"; do
    [ "$python" = "$OWN_PYTHON" ] || variant "$python" "$TORCH_VERSION"
done
for torch in "${TORCHES[@]}"; do
    [ "$torch" = "$OWN_TORCH" ] || variant "$OWN_PYTHON" "$torch"
done
if [ ! -e tests/slurm/run.sh ]; then
    note "SLURM jobs" skipped "there is no tests/slurm/run.sh"
elif ! command -v slurmctld > /dev/null && [ "$(id -u)" != 0 ]; then
    note "SLURM jobs" skipped "SLURM is not installed, and only root can install it"
else
    check "SLURM jobs" bash tests/slurm/run.sh
fi

printf '\n== Summary after %s s\n' "$SECONDS"
printf '%s\n' "${TABLE[@]}"
exit "$STATUS"
