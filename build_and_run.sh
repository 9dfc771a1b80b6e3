#!/usr/bin/env bash
# One command from a fresh checkout to a running demo: makes .venv, installs with pinned versions, runs the main job.
# Needs Linux and Python 3.10 or newer (PYTHON=... picks one). Uses a GPU if torch sees one. Arguments go to the demo.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/flash-attn ] || scripts/install '.[cli]'
exec .venv/bin/flash-attn demo "$@"
