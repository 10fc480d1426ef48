#!/usr/bin/env bash
# Runs every check: ruff, mypy, pytest. Arguments go to pytest: scripts/test.sh -k checkpoint
set -euo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$REPO"
source scripts/environment.sh
ensure_environment dev

echo "== ruff" && ruff check . && ruff format --check .
echo "== mypy" && mypy megatron_lite pretrain_gpt.py tools
echo "== pytest" && python -m pytest "$@"
