#!/bin/bash
# Downloads Debian's cloud kernels, with their modules and headers, into a cache; installs nothing.
#
#   tests/vm/fetch.sh [VERSION...]     5.10, 6.1, 6.12 and 7.2 unless said otherwise
#
# The cache is $MEMLEAK_KERNELS, ~/.cache/memleak-kernels unless set; VERSION lies there in kernels/VERSION, with the full
# release in kernels/VERSION/.release. What is there is kept; remove its folder to fetch the newest release again. apt does
# the work, with a state of its own in the cache, and verifies the archive's signatures.
set -euo pipefail

cache=${MEMLEAK_KERNELS:-${XDG_CACHE_HOME:-$HOME/.cache}/memleak-kernels}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

say() {
    printf 'fetch: %s\n' "$*" >&2
}

suite_of() {
    case $1 in
    5.10) echo bullseye ;;
    6.1) echo bookworm ;;
    # Not trixie's: this one is built with gcc 12, as bookworm has it.
    6.12) echo bookworm-backports ;;
    *) echo forky ;;
    esac
}

# Where this machine gets Debian's packages from; elsewhere, say on Ubuntu, from Debian itself.
archive() {
    local uri
    uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -E '/debian/?$' | sort -u | head -n 1)
    echo "${uri:-http://deb.debian.org/debian}"
}

# Build tools that want a newer C library than this machine's run with the one of their own suite.
wrap_tools() {
    local folder=$1 debs=$2 tool new=()
    while read -r tool; do
        # No pipe: ldd fails for some, which is no reason to stop.
        [[ $(ldd "$tool" 2>&1) != *GLIBC_*"not found"* ]] || new+=("$tool")
    done < <(find "$folder"/usr/lib/linux-kbuild-* -type f -perm -u+x)
    [ "${#new[@]}" -gt 0 ] || return 0
    mkdir -p "$debs/tools"
    (cd "$debs/tools" && "${apt_get[@]}" download libc6 libelf1t64 zlib1g libzstd1)
    for tool in "$debs"/tools/*.deb; do
        dpkg -x "$tool" "$folder/tools"
    done
    for tool in "${new[@]}"; do
        mv "$tool" "$tool.elf"
        # What follows the folder's name is the same wherever the folder is moved to.
        cat >"$tool" <<WRAPPER
#!/bin/sh
folder='$cache/kernels/$version/tools/usr/lib'
exec "\${folder}64/ld-linux-x86-64.so.2" --library-path "\$folder/x86_64-linux-gnu" "\$0.elf" "\$@"
WRAPPER
        chmod 755 "$tool"
    done
}

# Downloads one version and unpacks it; what it says goes to the log.
fetch() {
    local version=$1 state=$cache/apt/$1 folder=$cache/kernels/$1.new final=$cache/kernels/$1 release packages
    local debs=$state/debs apt_get apt_cache options
    rm -rf "$folder" "$debs"
    mkdir -p "$folder" "$debs" "$state/lists/partial" "$state/cache/archives/partial" "$state/empty"
    : >"$state/status"
    echo "deb [signed-by=$keyring] $(archive) $(suite_of "$version") main" >"$state/sources.list"
    options=(-q -o Dir::State="$state" -o Dir::State::status="$state/status" -o Dir::State::Lists="$state/lists"
        -o Dir::Cache="$state/cache" -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts="$state/empty"
        -o Dir::Etc::PreferencesParts="$state/empty" -o Acquire::Languages=none -o Acquire::Retries=3
        -o APT::Architecture=amd64 -o APT::Sandbox::User=root)
    apt_get=(apt-get "${options[@]}")
    apt_cache=(apt-cache "${options[@]}")
    "${apt_get[@]}" -o APT::Update::Error-Mode=any update
    # The newest release that has both, an image and headers.
    release=$("${apt_cache[@]}" pkgnames "linux-headers-$version." | sed -nE 's/^linux-headers-(.*-cloud-amd64)$/\1/p' |
        sort -V | while read -r candidate; do
            [ -z "$("${apt_cache[@]}" pkgnames "linux-image-$candidate" | grep -x "linux-image-$candidate")" ] ||
                echo "$candidate"
        done | tail -n 1)
    if [ -z "$release" ]; then
        echo "E: the archive has no cloud kernel $version any more"
        return 1
    fi
    # The newest kernels are split over several packages.
    packages=$("${apt_cache[@]}" depends "linux-image-$release" "linux-headers-$release" |
        sed -nE 's/^ *Depends: (linux-(binary|modules|headers|kbuild)-[^ <>]*)$/\1/p' | sort -u)
    # shellcheck disable=SC2086
    (cd "$debs" && "${apt_get[@]}" download "linux-image-$release" "linux-headers-$release" $packages)
    for package in "$debs"/*.deb; do
        dpkg -x "$package" "$folder"
    done
    # The Makefiles of the headers expect to be installed.
    find "$folder/usr/src" -name Makefile -size -2k -exec \
        sed -i "s#\(^\|[ =]\)/usr/\(src\|lib\)/linux#\1$final/usr/\2/linux#g" {} +
    wrap_tools "$folder" "$debs"
    echo "$release" >"$folder/.release"
    rm -rf "$final" "$debs"
    mv "$folder" "$final"
}

[ $# -gt 0 ] || set -- 5.10 6.1 6.12 7.2
if [ ! -e "$keyring" ]; then
    say "failed to find $keyring, which says whose kernels to trust: install debian-archive-keyring"
    exit 1
fi
mkdir -p "$cache/kernels" "$cache/apt"
# Two runs at once would spoil each other's state.
exec 9>"$cache/lock"
flock 9
for version; do
    if [ -e "$cache/kernels/$version/.release" ]; then
        continue
    fi
    say "downloading Linux $version"
    # A function in a condition would go on after errors.
    set +e
    (
        set -e
        fetch "$version"
    ) >"$cache/apt/$version.log" 2>&1
    code=$?
    set -e
    if [ "$code" -ne 0 ]; then
        tail -n 5 "$cache/apt/$version.log" >&2
        say "failed to fetch Linux $version: see $cache/apt/$version.log"
        exit 1
    fi
done
