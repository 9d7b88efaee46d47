#!/bin/bash
# Runs the end-to-end tests in virtual machines, one per kernel, and says what passed, failed and was skipped in each.
#
#   tests/vm/run.sh [VERSION...]     5.10, 6.1, 6.12 and 7.2 unless said otherwise
#
# Needs no root. TESTS="userspace::glibc kernel::" takes the tests whose names contain one of these. A test skips where
# a feature is missing, never because of the kernel's version; each reason is printed. Logs: target/vm/VERSION/log.
set -euo pipefail
cd "$(dirname "$0")/../.."

cache=${MEMLEAK_KERNELS:-${XDG_CACHE_HOME:-$HOME/.cache}/memleak-kernels}
work=${CARGO_TARGET_DIR:-$PWD/target}/vm
# What a guest can show: accounts of the kernel and of processes, on every way to attach that the kernel has.
read -ra tests <<<"${TESTS:-kernel:: userspace:: run:: stacks:: cli::doctor}"
# Seconds that a guest may take.
limit=${LIMIT:-1200}
# Emulated processors are this much slower, as far as limits of time in the tests are concerned.
slower=10

say() {
    printf 'kernels: %s\n' "$*" >&2
}

[ $# -gt 0 ] || set -- 5.10 6.1 6.12 7.2
for command in qemu-system-x86_64 busybox cpio; do
    if ! command -v "$command" >/dev/null; then
        say "$command is not installed: tests/setup.sh kernels installs it"
        exit 1
    fi
done
tests/vm/fetch.sh "$@"

say 'building'
rm -rf "$work/image"
mkdir -p "$work/image"
messages=$(cargo test --workspace --no-run --message-format=json-render-diagnostics)
suite=$(sed -nE 's#.*"name":"suite",.*"executable":"([^"]*)".*#\1#p' <<<"$messages" | tail -n 1)
programs=$(sed -nE '/"reason":"build-script-executed"/{/[/#]memleak_tests[@#]|tests#/s#.*"out_dir":"([^"]*)".*#\1#p}' <<<"$messages" | tail -n 1)
memleak=$(dirname "$(dirname "$suite")")/memleak
# Debug information would triple the image.
strip --strip-debug -o "$work/image/memleak" "$memleak"
strip --strip-debug -o "$work/image/suite" "$suite"

# Builds leakmod for a kernel.
build_module() {
    local version=$1 folder=$work/$1/leakmod headers
    headers=$cache/kernels/$version/usr/src/linux-headers-$(cat "$cache/kernels/$version/.release")
    rm -rf "$folder"
    mkdir -p "$folder"
    cp tests/vm/leakmod/* "$folder"
    # This machine's compiler in place of the kernel's: without what older ones lack. No pahole, so no BTF.
    make -s -C "$headers" M="$folder" CC="${CC:-gcc}" KCFLAGS=-Wno-attributes CONFIG_DEBUG_INFO_BTF_MODULES= \
        CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT= modules
    strip --strip-debug "$folder/leakmod.ko"
}

# Boots one kernel with the tests. The suite expects programs and binary where they were built.
run_guest() {
    local version=$1
    tests/vm/boot.sh -t "$limit" -m 2048 "$version" - "$work/image/suite=$suite" "$work/image/memleak=$memleak" \
        "$programs" "$programs=$programs" "$work/$version/leakmod/leakmod.ko" "${libraries[@]}" <<GUEST
export MEMLEAK_TEST_MODULE=/lab/leakmod.ko MEMLEAK_TEST_SLOWER=$slower
exec "$suite" --include-ignored --show-output --test-threads=2 ${tests[*]}
GUEST
}
