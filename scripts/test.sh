#!/usr/bin/env bash
# Runs every check: ruff, mypy, pytest. Arguments go to pytest: scripts/test.sh -k checkpoint
# With --full also what takes hours, and other versions of Python and torch: see scripts/test_full.sh.
set -euo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$REPO"
if [ "${1:-}" = --full ]; then
    exec scripts/test_full.sh "${@:2}"
fi
source scripts/environment.sh
ensure_environment dev

# A line each: bash goes on after a failure inside of a && b.
echo "== ruff"
ruff check .
ruff format --check .
# Alongside the tests, as it uses one core.
echo "== mypy"
mypy megatron_lite pretrain_gpt.py tools &
types=$!
# Three test files at a time: their worker processes wait for each other a good part of the time, so two leave cores idle. In the order of their
# names, so that the long ones, which run command lines, do not come last.
echo "== pytest"
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
wait "$types" || { echo "mypy found errors, see above" >&2; exit 1; }
