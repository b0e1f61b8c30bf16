#!/usr/bin/env bash
cd "$(dirname "${BASH_SOURCE[0]}")/../.." && exec python3 -u -m bench.first_contact "$@"
