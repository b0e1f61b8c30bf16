#!/usr/bin/env bash
# The folder of results is named from where one is, the modules from the root.
[ -z "$OUT" ] || export OUT="$(realpath -m -- "$OUT")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && exec python3 -u -m bench.first_contact "$@"
