#!/bin/bash
# Boots a kernel that fetch.sh has fetched, without hardware virtualization, and runs a script in it as root.
#
#   tests/vm/boot.sh [-t SECONDS] [-m MIB] [-a KERNEL_ARGUMENTS] [-v] VERSION SCRIPT [FILE | FILE=PATH]...
#
#   -t  hard limit for the whole guest (default 120)     -v  print the kernel's console too
#   -m  memory (default 1024)                            -a  more arguments for the kernel
#
# The guest has busybox, the files (in /lab, or at PATH; a folder is copied with all that is in it), and the shared
# libraries that these need. SCRIPT is read from standard input when it is `-`. Its output is printed as it comes and
# its exit code is that of boot.sh; 124 when the guest ran out of time, 125 when it could not be booted or died: then the
# end of the kernel's console is printed.
set -euo pipefail

cache=${MEMLEAK_KERNELS:-${XDG_CACHE_HOME:-$HOME/.cache}/memleak-kernels}

usage() {
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 125
}

seconds=120 memory=1024 arguments='' verbose=''
while getopts t:m:a:v option; do
    case $option in
    t) seconds=$OPTARG ;;
    m) memory=$OPTARG ;;
    a) arguments=$OPTARG ;;
    v) verbose=1 ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 2 ] || usage
version=$1 script=$2
shift 2

kernel=$cache/kernels/$version
if [ ! -e "$kernel/.release" ]; then
    echo "boot: there is no Linux $version in $cache: run tests/vm/fetch.sh $version" >&2
    exit 125
fi
release=$(cat "$kernel/.release")
vmlinuz=$kernel/boot/vmlinuz-$release
[ -e "$vmlinuz" ] || vmlinuz=$kernel/usr/lib/modules/$release/vmlinuz
# QEMU 7.2's emulation of cmpxchg16b spoils the flags for Linux 6.12, which then crashes in half of the boots. Not hidden
# from the others: without it 7.2 loses task storage.
cpu=max
[ "$version" != 6.12 ] || cpu=max,-cx16

work=$(mktemp -d "${TMPDIR:-/tmp}/memleak-vm.XXXXXX")
qemu=''
cleanup() {
    [ -z "$qemu" ] || kill "$qemu" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

root=$work/root
mkdir -p "$root"/{bin,sbin,dev,proc,sys,tmp,root,etc,run,lib,lib64,usr,lab}
ln -s ../bin ../lib ../lib64 ../sbin "$root/usr/"
cp "$(command -v busybox)" "$root/bin/busybox"

# Copies the shared libraries that a program or library needs, each to its own path.
copy_libraries() {
    local library
    { ldd "$1" 2>/dev/null || true; } | sed -nE 's#^\t(.* => )?(/[^ ]+) \(.*#\2#p' | while read -r library; do
        if [ ! -e "$root$library" ]; then
            mkdir -p "$root${library%/*}"
            cp -L "$library" "$root$library"
        fi
    done || true
}
for file; do
    source=${file%%=*}
    target=/lab/$(basename "$source")
    case $file in *=*) target=${file#*=} ;; esac
    if [ ! -e "$source" ]; then
        echo "boot: there is no file $source" >&2
        exit 125
    fi
    mkdir -p "$(dirname "$root$target")"
    cp -rL "$source" "$root$target"
    while read -r program; do
        copy_libraries "$program"
    done < <(find "$root$target" -type f \( -perm -u+x -o -name '*.so*' \))
done
cat "${script/#-//dev/stdin}" >"$root/lab/script"
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/lab:/bin:/sbin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
# Unless what was copied in lies there.
[ -n "$(ls -A /tmp)" ] || mount -t tmpfs tmp /tmp
mount -t tracefs tracing /sys/kernel/tracing
mount -t debugfs debug /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
ifconfig lo up
stty -F /dev/ttyS1 raw -echo
cd /lab
sh /lab/script >/dev/ttyS1 2>&1 </dev/null
printf '\nguest ended with code %s\n' $? >/dev/ttyS1
poweroff -f
INIT
chmod 755 "$root/init"
(cd "$root" && find . | cpio --quiet -o -H newc) >"$work/initrd"
rm -rf "$root"

: >"$work/console"
: >"$work/guest"
timeout -k 5 "$seconds" nice -n 10 qemu-system-x86_64 -accel tcg,thread=multi -cpu "$cpu" -smp 2 -m "$memory" \
    -nodefaults -no-reboot -display none -kernel "$vmlinuz" -initrd "$work/initrd" \
    -append "console=ttyS0 loglevel=5 panic=-1 oops=panic random.trust_cpu=on $arguments" \
    -serial file:"$work/console" -serial file:"$work/guest" </dev/null >&2 &
qemu=$!
# Ends by itself when qemu has ended and all is printed.
tail -q -n +1 -f --pid=$qemu "$work/guest" | sed -u '/^guest ended with code [0-9]*$/d' || true
ended=0
wait "$qemu" || ended=$?
qemu=''
code=$(sed -n 's/^guest ended with code \([0-9]*\)$/\1/p' "$work/guest" | tail -n 1)
if [ -n "$verbose" ] || [ -z "$code" ]; then
    tr -d '\r' <"$work/console" | tail -n 200 >&2
fi
if [ -n "$code" ]; then
    exit "$code"
fi
if [ "$ended" = 124 ] || [ "$ended" = 137 ]; then
    echo "boot: Linux $version did not end within $seconds seconds" >&2
    exit 124
fi
echo "boot: Linux $version ended without a result" >&2
exit 125
