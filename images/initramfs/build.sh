#!/bin/sh
# build.sh OUTPUT [MODULES]: packs init, shrc, busybox and a link per applet into OUTPUT, a cpio.gz: the same bytes from
# the same busybox, whoever builds. The directory MODULES (VERSION/modules.dep and so on) becomes /lib/modules.
set -eu
output=${1:?usage: build.sh OUTPUT [MODULES]}
modules=${2:-}
busybox=${BUSYBOX:-/bin/busybox}
here=$(cd "$(dirname "$0")" && pwd)

if ! [ -x "$busybox" ]; then
    echo "build.sh: $busybox is not there: apt-get install busybox-static" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
(
    umask 022
    mkdir "$root"
    cd "$root"
    mkdir -p bin dev etc lib/modules proc sys tmp
    cp "$here/init" init
    cp "$here/shrc" etc/shrc
    cp "$busybox" bin/busybox
    chmod 755 init bin/busybox
    chmod 644 etc/shrc
    for applet in $("$busybox" --list); do
        [ "$applet" = busybox ] || ln -s busybox "bin/$applet"
    done
)
if [ "$modules" ]; then
    cp -rL "$modules/." "$root/lib/modules"
    chmod -R u=rwX,go=rX "$root/lib/modules"
fi
# Times, owners and inode numbers are the things that would differ.
find "$root" -exec touch -h -d @0 {} +
if ! (cd "$root" && find . | LC_ALL=C sort | "$busybox" cpio -o -H newc -R 0:0 --renumber-inodes --ignore-devno \
    -F "$work/cpio") 2>"$work/log"; then
    cat "$work/log" >&2
    exit 1
fi
gzip -9n <"$work/cpio" >"$work/gz"
mv "$work/gz" "$output"
