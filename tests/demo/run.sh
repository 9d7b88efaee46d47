#!/bin/sh
# Shows memleak at work: starts the demo service, watches it for half a minute, and says what was found.
#
#   tests/demo/run.sh MEMLEAK DEMO     paths of both programs; needs root
#
# Exit code 0 when the demo's leak was found, 1 when it was not, 2 when memleak could not run. Report and alerts are
# written to the current folder, as config.example.toml says.
set -eu
memleak=$1
demo=$2
config=$(dirname "$0")/../../config.example.toml
report=memleak-report.html
alerts=memleak-alerts.ndjson
leak=remember_applied_discount

# The alerts file is appended to: what an earlier run wrote is no proof. The demo ends by itself if we are killed.
before=0
[ ! -e "$alerts" ] || before=$(wc -c <"$alerts")
"$demo" 120 >/dev/null &
pid=$!
trap 'kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true' EXIT
trap 'exit 130' HUP INT TERM
printf 'demo: memleak-demo runs as process %s; it leaks in %s()\n' "$pid" "$leak"

code=0
"$memleak" --config "$config" --duration 30s || code=$?
if [ "$code" -gt 1 ]; then
    printf 'demo: memleak could not run (exit code %s)\n' "$code" >&2
    exit 2
fi

new_alerts=$(tail -c "+$((before + 1))" "$alerts" 2>/dev/null || true)
firing=$(printf '%s\n' "$new_alerts" | grep -c '"status":"firing"' || true)
printf '\ndemo: %s alert lines; report: %s; alerts: %s\n' "$firing" "$PWD/$report" "$PWD/$alerts"
if ! printf '%s\n' "$new_alerts" | grep '"status":"firing"' | grep -q "\"$leak\""; then
    printf 'demo: the leak in %s() was NOT found\n' "$leak" >&2
    exit 1
fi
printf 'demo: the leak in %s() was found\n' "$leak"
