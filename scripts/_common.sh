# Shared by scripts/setup, test and lint (sourced): strict mode, the checkout as the working directory, messages.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV=$PWD/.venv
# Without cached bytecode every start of Python compiles everything anew: seconds in the lab.
unset PYTHONDONTWRITEBYTECODE

say() { echo "$(basename "$0"): $*" >&2; }

die() {
    say "$@"
    exit 1
}

# The comment at the head of the script is its manual.
show_help() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }
