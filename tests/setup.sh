#!/bin/sh
# Installs the system packages that memleak needs, on Debian 12+ and Ubuntu; asks for nothing.
#
#   tests/setup.sh build    what the build needs
#   tests/setup.sh test     ... and what the tests need
#   tests/setup.sh kernels  what the build and `make test-kernels` need
#   tests/setup.sh lint     what the tests and `make lint` need
#   tests/setup.sh bench    what the build and `make bench` need
#   tests/setup.sh glibcs   installs nothing, and fetches C libraries of other Debian releases into target/glibcs, where
#                           the tests of probe placement find them: older and newer ones than the machine's
#
# Only what is missing is installed: with everything in place it needs no root and no network. Packages for the build
# must come; one that only some tests need may be missing in a distribution, then those tests say that they skip.
set -eu

say() {
    printf 'setup: %s\n' "$*" >&2
}

installed() {
    dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null | grep -q '^.i'
}

available() {
    apt-cache show --no-all-versions "$1" >/dev/null 2>&1
}

# The first of the given packages that is installed, else the first that can be installed, else the last.
first_of() {
    for package in "$@"; do
        if installed "$package"; then
            echo "$package"
            return
        fi
    done
    for package in "$@"; do
        if available "$package"; then
            echo "$package"
            return
        fi
    done
    echo "$package"
}

# Prints those of the given packages that are not installed.
missing_of() {
    for package in "$@"; do
        installed "$package" || echo "$package"
    done
}

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    say 'this is not Debian or Ubuntu: install clang (14 or later), the headers of libelf and zlib, pkg-config, gcc and make yourself'
    exit 0
fi

list_packages() {
    # BPF programs need clang 14 or later; a newer one gives the verifier easier code.
    needed="$(first_of clang-19 clang-18 clang-17 clang-16 clang-15 clang-14 clang) libelf-dev zlib1g-dev pkg-config make gcc libc6-dev"
    wanted=''
    test_allocators="g++ musl-tools libjemalloc2 $(first_of libgoogle-perftools4 libgoogle-perftools4t64) $(first_of libtcmalloc-minimal4 libtcmalloc-minimal4t64) $(first_of libmimalloc2.0 libmimalloc3)"
    case "$1" in
    build) ;;
    test | lint)
        wanted="$test_allocators redis-server redis-tools nginx memcached sqlite3 python3 perl nodejs gdb wrk golang-go bpftool util-linux xz-utils $(first_of chromium chromium-browser) $(first_of chromium-driver chromium-chromedriver)"
        if [ "$1" = lint ]; then
            wanted="$wanted $(first_of clang-format-19 clang-format)"
        fi
        ;;
    kernels)
        wanted="qemu-system-x86 busybox-static cpio debian-archive-keyring binutils $test_allocators"
        ;;
    bench)
        wanted="redis-server redis-tools sqlite3 nginx wrk python3 heaptrack valgrind"
        ;;
    *)
        say "unknown purpose '$1': build, test, kernels, lint, bench or glibcs"
        exit 2
        ;;
    esac
    missing_needed=$(missing_of $needed)
    missing_wanted=$(missing_of $wanted)
}

# Unpacks the C library of a Debian release into target/glibcs/RELEASE, with package lists of its own.
fetch_glibc() {
    release=$1
    folder=target/glibcs/$release
    [ ! -e "$folder/libc.so.6" ] || return 0
    say "fetching the C library of Debian $release"
    work=$(mktemp -d)
    mkdir -p "$work/lists/partial" "$work/archives/partial"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $release main" >"$work/sources.list"
    apt_there() {
        apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
            -o Dir::State::lists="$work/lists" -o Dir::Cache::archives="$work/archives" -o Dir::Cache::pkgcache= \
            -o Dir::Cache::srcpkgcache= -o Acquire::Languages=none -o Acquire::Retries=3 -o APT::Sandbox::User=root "$@"
    }
    if apt_there update && (cd "$work" && apt_there download "libc6/$release" && dpkg-deb -x libc6_*.deb unpacked); then
        mkdir -p "$folder"
        # Below /usr in the newer ones.
        find "$work/unpacked" -name libc.so.6 -exec cp -L {} "$folder/" ';'
    fi
    rm -rf "$work"
    [ -e "$folder/libc.so.6" ] || say "failed to fetch that of $release"
}

purpose=${1:-build}
if [ "$purpose" = glibcs ]; then
    fetch_glibc bullseye
    fetch_glibc trixie
    exit 0
fi
list_packages "$purpose"
if [ -z "$missing_needed$missing_wanted" ]; then
    exit 0
fi

if [ "$(id -u)" -ne 0 ]; then
    if [ -z "$missing_needed" ]; then
        # What needs these skips itself and says so.
        say "not installed:" $missing_wanted
        say "what needs them is skipped; 'sudo tests/setup.sh $purpose' installs them"
        exit 0
    fi
    say "not installed:" $missing_needed $missing_wanted
    say "installing packages needs root; go on with: sudo tests/setup.sh $purpose"
    exit 1
fi

# Servers are installed for the tests to start; none may be started by its package, now or at the next boot.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
fi

export DEBIAN_FRONTEND=noninteractive
apt() {
    apt-get -qq -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >/dev/null
}

say 'reading package lists'
apt update
# Only now is it known what this distribution has.
list_packages "$purpose"
say 'installing' $missing_needed $missing_wanted
if [ -n "$missing_needed" ]; then
    apt install --no-install-recommends $missing_needed
fi
if [ -n "$missing_wanted" ] && ! apt install --no-install-recommends $missing_wanted; then
    # One package that does not exist refuses the whole list: take the others one by one.
    for package in $missing_wanted; do
        apt install --no-install-recommends "$package" ||
            say "failed to install $package: what needs it is skipped"
    done
fi

if command -v systemctl >/dev/null; then
    for unit in nginx memcached redis-server; do
        case " $(echo $missing_wanted) " in
        *" $unit "*) systemctl disable --quiet "$unit" 2>/dev/null || true ;;
        esac
    done
fi
