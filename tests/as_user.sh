#!/bin/sh
# Runs a command as the user who called sudo, or as oneself: what `sudo make` builds must not belong to root.
set -eu
if [ "$(id -u)" -eq 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then
    exec sudo -u "$SUDO_USER" -H env "PATH=$PATH" ${CARGO_TARGET_DIR:+"CARGO_TARGET_DIR=$CARGO_TARGET_DIR"} "$@"
fi
exec "$@"
