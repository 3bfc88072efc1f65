#!/bin/sh
# Build the images: docker/images.sh [train] [dense] [mlflow], all three without a name.
#
#   BASE_IMAGE    Debian or Ubuntu with python3 (Dockerfile); a local one by docker/dev-image.sh
#   REGISTRY, TAG names are $REGISTRY/vitpipe-train:$TAG; without a registry vitpipe-train:$TAG, tag 0.1.0
#   CA            file with the certificates of a company's network
#   INDEX         index of packages; INDEX_FILE: a file with its address, where that has a password
#   CPU=1         no CUDA packages; needs TORCH_INDEX, an index with CPU builds of torch
#   OUTPUT        further options for `docker build`, such as --push
#
# Needs BuildKit: Docker 23 or later with buildx, or Docker 20.10. Prints the size of each image by layer.
set -eu

for image; do
  case $image in
    train | dense | mlflow) ;;
    *) echo "images: there is no image '$image'. Fix: name train, dense or mlflow" >&2; exit 2 ;;
  esac
done

here=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/pyproject.toml")
TAG=${TAG:-$version}
revision=$(git -C "$here" rev-parse HEAD 2> /dev/null || echo unknown)
[ -z "$(git -C "$here" status --porcelain -- vitpipe requirements.lock docker 2> /dev/null)" ] || revision="$revision+changes"
# Of the files of the package, by name and content: the same in a checkout and in the image.
digest=$(cd "$here/vitpipe" && find . -type f ! -path '*/__pycache__/*' | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-64)

# Docker 20.10 brings BuildKit's client, later ones have it as the plugin buildx. Several may be on the PATH.
docker=
IFS=:
for folder in $PATH; do
  [ -x "$folder/docker" ] || continue
  major=$("$folder/docker" version --format '{{.Client.Version}}' 2> /dev/null | cut -d. -f1)
  if "$folder/docker" buildx version > /dev/null 2>&1 || [ "${major:-99}" -lt 23 ]; then
    docker="$folder/docker"
    break
  fi
done
unset IFS
[ -n "$docker" ] || { echo "images: no Docker with BuildKit is on the PATH. Fix: install the plugin docker-buildx" >&2; exit 2; }
"$docker" info > /dev/null 2>&1 || { echo "images: the Docker engine does not answer. Fix: start it" >&2; exit 2; }

[ $# -gt 0 ] || set -- train dense mlflow
for image; do
  name=${REGISTRY:+$REGISTRY/}vitpipe-$image:$TAG
  echo "images: building $name"
  target=stages
  [ "$image" != mlflow ] || target=mlflow
  started=$(date +%s)
  # The host's network: builders of company machines reach the index by it only.
  DOCKER_BUILDKIT=1 "$docker" build --network host --progress "${PROGRESS:-auto}" --file "$here/docker/Dockerfile" \
    --target "$target" --build-arg "KIND=$image" --tag "$name" ${OUTPUT:-} \
    ${BASE_IMAGE:+--build-arg "BASE_IMAGE=$BASE_IMAGE"} ${CA:+--secret "id=ca,src=$CA"} \
    ${INDEX:+--build-arg "INDEX=$INDEX"} ${INDEX_FILE:+--secret "id=index,src=$INDEX_FILE"} \
    ${CPU:+--build-arg "CPU=$CPU"} ${TORCH_INDEX:+--build-arg "TORCH_INDEX=$TORCH_INDEX"} \
    --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "CODE_DIGEST=$digest" "$here"
  echo "images: $name after $(($(date +%s) - started)) s"
  "$docker" history --no-trunc --format '{{.Size}}\t{{.CreatedBy}}' "$name" | grep -v '^0B' | cut -c1-150
done
