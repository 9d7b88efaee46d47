#!/bin/bash
# What `memleak kernel` costs: throughput of find, tar and a compile with it, as a ratio to that without, in turns.
#
#   sudo tests/bench/kernel.sh [FOLDER] [ROUNDS] [ARGUMENTS OF memleak kernel...]
#
# FOLDER is a source tree (default: cargo's). Prints each round, and the median; 1 is no loss.
set -euo pipefail
cd "$(dirname "$0")/../.."
memleak=${MEMLEAK:-$PWD/target/release/memleak}
folder=${1:-${CARGO_HOME:-$HOME/.cargo}/registry/src}
rounds=${2:-5}
shift $(($# > 2 ? 2 : $#))

work=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill -INT "$pid"; rm -rf "$work"' EXIT
printf '#include <stdio.h>\n#include <stdlib.h>\n#include <pthread.h>\n#include <math.h>\nint main(void) { return 0; }\n' >"$work/unit.c"

load() {
    for _ in $(seq 15); do
        find "$folder" -type f -size +1k >/dev/null
        tar -cf - "$folder" 2>/dev/null | cat >/dev/null
    done
    for _ in $(seq 100); do
        cc -O1 -c -o "$work/unit.o" "$work/unit.c"
    done
}

seconds() {
    local start=$EPOCHREALTIME
    load
    awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { print b - a }'
}

load # the page cache is warm for all
for _ in $(seq "$rounds"); do
    base=$(seconds)
    (cd "$work" && exec "$memleak" kernel --quiet --alerts '' --report '' "$@") >"$work/log" 2>&1 &
    pid=$!
    sleep 5 # attached, and the budget has had its say
    load
    traced=$(seconds)
    kill -INT "$pid"
    wait "$pid" || true
    pid=
    awk -v b="$base" -v t="$traced" 'BEGIN { printf "base %.2f s, traced %.2f s, ratio %.3f\n", b, t, b / t }'
done | tee "$work/ratios"
awk '{ print $NF }' "$work/ratios" | sort -n | awk '{ r[NR] = $1 } END { printf "median %.3f\n", r[int((NR + 1) / 2)] }'
