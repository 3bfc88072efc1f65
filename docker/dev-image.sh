#!/bin/sh
# Build vitpipe-dev:latest, the image of `vitpipe local --dev`: plain Debian with Python and git.
# The checkout and its environment are mounted into it, so a change of the code needs no new image.
#
#   docker/dev-image.sh [MIRROR]
#
# Needs root, a running Docker engine and debootstrap; no registry. The Debian release is that of this machine, if it
# runs Debian, because the mounted Python was linked against this machine's libraries.
set -eu

. /etc/os-release
suite=bookworm
[ "${ID:-}" = debian ] && suite=${VERSION_CODENAME:-$suite}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# python3 brings the shared libraries that any Python links to; git is called for the commit in card.json.
debootstrap --variant=minbase --include=python3,ca-certificates,git "$suite" "$folder" "$@"
# Caches of apt, which no stage needs.
rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
tar -C "$folder" -c . | docker import --change 'CMD ["python3"]' - vitpipe-dev:latest
