#!/bin/sh
# Make vitpipe-dev:latest, the plain image of `vitpipe local --dev`: Debian with its Python and nothing of ours.
# The checkout and its environment are mounted into it, so it need not be made again when code changes.
#
#   docker/dev-image.sh [MIRROR]
#
# Needs root, a running Docker engine and debootstrap. The Debian release is that of this machine if it can be
# told, because the mounted Python was linked against this machine's libraries.
set -eu

. /etc/os-release
suite=bookworm
[ "${ID:-}" = debian ] && suite=${VERSION_CODENAME:-$suite}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# python3 brings the libraries that any Python links to; git names the commit in the cards.
debootstrap --variant=minbase --include=python3,ca-certificates,git "$suite" "$folder" "$@"
rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
tar -C "$folder" -c . | docker import --change 'CMD ["python3"]' - vitpipe-dev:latest
