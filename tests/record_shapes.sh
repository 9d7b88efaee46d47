#!/bin/sh
# Records every shape of programs/heap_shapes.c into rules/recordings, all at once: ten minutes, a snapshot every two
# seconds. What is there is replaced. Usage: record_shapes.sh MEMLEAK [DURATION [FOLDER]] (root)
set -eu
memleak=$(realpath "$1")
duration=${2:-10m}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
folder=${3:-rules/recordings}
trap 'rm -rf "$work"' EXIT
# No path of this machine in the recordings.
gcc -O1 -g -Wall -Wextra -fno-omit-frame-pointer -fno-optimize-sibling-calls --param=max-completely-peel-times=0 -pthread \
	-ffile-prefix-map="$PWD"/= -o "$work/heap_shapes" tests/programs/heap_shapes.c
for shape in leak slow_leak cache_fill warm_up sawtooth load_ramp; do
	(
		cd "$work"
		# Alerts are no failure here.
		"$memleak" -q --interval 2s --duration "$duration" --set reachability.automatic=false --report "" --alerts "" \
			--record "$shape.memleak" -- ./heap_shapes "$shape" >/dev/null || [ $? -eq 1 ]
	) &
done
wait
for shape in leak slow_leak cache_fill warm_up sawtooth load_ramp; do
	install -m 644 "$work/$shape.memleak" "$folder"/
done
