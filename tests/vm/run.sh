#!/bin/bash
# Runs the end-to-end tests in virtual machines, one per kernel, and says what passed, failed and was skipped in each.
#
#   tests/vm/run.sh [VERSION...]     5.10, 6.1, 6.12 and 7.2 unless said otherwise
#
# Needs no root. TESTS="userspace::glibc leakmod::" takes the tests whose names contain one of these. A test skips where
# a feature is missing, never because of the kernel's version; each reason is printed. Logs: target/vm/VERSION/log.
set -euo pipefail
cd "$(dirname "$0")/../.."

cache=${MEMLEAK_KERNELS:-${XDG_CACHE_HOME:-$HOME/.cache}/memleak-kernels}
target=${CARGO_TARGET_DIR:-$PWD/target}
work=$target/vm
# What a guest can show: accounts of processes and of the kernel, on every way to attach that the kernel has.
read -ra tests <<<"${TESTS:-leakmod:: kernel_live:: userspace:: run:: stacks:: interpreted:: cli::doctor}"
# Seconds that one guest may take.
limit=${LIMIT:-1200}

say() {
    printf 'kernels: %s\n' "$*" >&2
}

[ $# -gt 0 ] || set -- 5.10 6.1 6.12 7.2
for command in qemu-system-x86_64 busybox cpio make strip; do
    if ! command -v "$command" >/dev/null; then
        say "$command is not installed: tests/setup.sh kernels installs it"
        exit 1
    fi
done
tests/vm/fetch.sh "$@"

say 'building'
messages=$(cargo test --workspace --no-run --message-format=json-render-diagnostics)
suite=$(grep -E '"target":\{[^}]*"name":"suite"' <<<"$messages" | grep -oE '"executable":"[^"]*"' | cut -d '"' -f 4)
programs=$(grep -oE '"MEMLEAK_TEST_PROGRAMS","[^"]*"' <<<"$messages" | cut -d '"' -f 4)
memleak=${suite%/deps/*}/memleak
mkdir -p "$work"
# Debug information would triple the image; the programs keep theirs, which the tests read.
strip --strip-debug -o "$work/memleak" "$memleak"
strip --strip-debug -o "$work/suite" "$suite"
# The suite expects everything where it is here.
image=("$work/suite=$suite" "$work/memleak=$memleak" "$programs=$programs")
for program in rust_jemalloc rust_mimalloc; do
    image+=("${suite%/deps/*}/$program=${suite%/deps/*}/$program")
done
# What programs load by name.
for library in libjemalloc.so.2 libtcmalloc.so.4 libtcmalloc_minimal.so.4 libmimalloc.so.2; do
    path=$(/sbin/ldconfig -p | awk -v name="$library" '$1 == name && !found++ { print $NF }')
    [ -z "$path" ] || image+=("$path=$path")
done
if [ -e /lib/ld-musl-x86_64.so.1 ]; then
    image+=(/lib/ld-musl-x86_64.so.1=/lib/ld-musl-x86_64.so.1)
fi

# A Python, with the modules that it loads when it starts.
if [[ ${tests[*]} == *interpreted* && -x /usr/bin/python3 ]]; then
    image+=("$(readlink -f /usr/bin/python3)=/usr/bin/python3" "$PWD/tests/programs=$PWD/tests/programs")
    while read -r module; do
        image+=("$module=$module")
    done < <(/usr/bin/python3 -c 'import sys; print(*{f for m in sys.modules.values() if (f := getattr(m, "__file__", None))}, sep="\n")')
fi

# Builds leakmod for a kernel.
build_module() {
    local folder=$work/$1/leakmod headers
    headers=$cache/kernels/$1/usr/src/linux-headers-$(cat "$cache/kernels/$1/.release")
    rm -rf "$folder"
    mkdir -p "$folder"
    cp tests/vm/leakmod/* "$folder"
    # This machine's compiler in place of the kernel's, without what it lacks; no pahole, so no type information.
    make -s -C "$headers" M="$folder" CC="${CC:-gcc}" KCFLAGS=-Wno-attributes CONFIG_DEBUG_INFO_BTF_MODULES= \
        CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT= modules >"$folder/log" 2>&1 || {
        cat "$folder/log" >&2
        return 1
    }
    strip --strip-debug "$folder/leakmod.ko"
}

# Says what became of the tests whose log is given.
summarize() {
    awk -v code="$2" -v seconds="$3" '
        /^test .* \.\.\. ok$/ { ok[$2] }
        /^test .* \.\.\. FAILED$/ { failed[$2] }
        /^SKIP / {
            name = $2
            sub(/:$/, "", name)
            reason = $0
            sub(/^SKIP [^ ]+ /, "", reason)
            skipped[name] = reason
        }
        /^test result: / { ended++ }
        END {
            for (name in skipped)
                if (name in ok) {
                    delete ok[name]
                    skips++
                    why[skipped[name]] = why[skipped[name]] " " name
                }
            for (reason in why)
                printf "skipped, %s:%s\n", reason, why[reason]
            for (name in ok)
                passed++
            for (name in failed)
                failures++
            if (ended < 4) {
                failures++
                printf "the tests did not end: code %d\n", code
            }
            printf "test result: %s. %d passed; %d failed; %d skipped; finished in %d s\n", failures ? "FAILED" : "ok",
                passed, failures, skips, seconds
        }' "$1"
}

failed=()
for version; do
    log=$work/$version/log
    build_module "$version"
    say "Linux $(cat "$cache/kernels/$version/.release")"
    start=$SECONDS code=0
    # Not CI there: a guest may skip what its kernel lacks.
    tests/vm/boot.sh -t "$limit" -m 2048 "$version" - "${image[@]}" "$work/$version/leakmod/leakmod.ko" >"$log" <<GUEST || code=$?
export MEMLEAK_TEST_MODULE=/lab/leakmod.ko
# Its unwind table takes longer to make here than probes wait for it: it is kept for the tests.
if command -v python3; then
    python3 -c 'import time; time.sleep(300)' &
    "$memleak" -p \$! --duration 30s --quiet --set report.path= --set alerts.file=
    kill \$!
fi
# One test runs a Python with more modules than there are here.
"$suite" --include-ignored --nocapture --test-threads=2 --skip locked_down --skip leakmod:: --skip kernel_live:: \
    --skip python_has_complete ${tests[*]}
code=\$?
# One after the other: it is the same kernel, and the same module, for all of them.
"$suite" --include-ignored --nocapture --test-threads=1 --skip locked_down --skip cli:: --skip userspace:: --skip run:: \
    --skip stacks:: --skip interpreted:: ${tests[*]} || code=\$?
# On their own, because there is no way back.
"$suite" --ignored --nocapture forbidden_ptrace || code=\$?
mount -t securityfs security /sys/kernel/security
"$suite" --ignored --nocapture locked_down || code=\$?
exit \$code
GUEST
    if [ "$code" -ne 0 ]; then
        failed+=("$version")
        grep -v '^test .* ok$' "$log" || true
    fi
    summarize "$log" "$code" $((SECONDS - start))
done
if [ "${#failed[@]}" -gt 0 ]; then
    say "failed: ${failed[*]}; logs in $work/VERSION/log"
    exit 1
fi
