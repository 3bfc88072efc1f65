#!/bin/sh
# Make the files of an overlay's secrets: sh k8s/secrets.sh k8s/overlays/NAME. Existing ones are kept.
#
#   DATABASE_HOST    Postgres, host or host:port (local: the overlay's own)
#   DATABASE_PASSWORD, STORAGE_ACCESS_KEY, STORAGE_SECRET_KEY    for local made at random, else asked for by these variables
#
# Passwords of MLflow are made at random. The files are readable by you alone and ignored by git; whoever has them has
# everything. With External Secrets or SOPS, make Secrets of the same names and keys by those instead.
set -eu
export LC_ALL=C    # ranges of characters are those of ASCII

overlay=${1:?"usage: sh k8s/secrets.sh k8s/overlays/NAME"}
[ -f "$overlay/kustomization.yaml" ] || { echo "secrets: $overlay is no overlay (it has no kustomization.yaml)" >&2; exit 2; }
folder=$overlay/secrets
kept() {
  echo "secrets: $folder exists and is kept. To make new ones, remove it; the server's passwords then change, too" >&2
  exit 0
}
[ ! -d "$folder" ] || kept
[ ! -e "$folder" ] || { echo "secrets: $folder is a file. Fix: move it away" >&2; exit 2; }
random() { tr -dc 'a-zA-Z0-9' < /dev/urandom | head -c "$1"; }

user=mlflow
if [ "$(basename "$overlay")" = local ]; then
  DATABASE_HOST=${DATABASE_HOST:-postgres:5432}
  DATABASE_PASSWORD=${DATABASE_PASSWORD:-$(random 32)}
  STORAGE_ACCESS_KEY=${STORAGE_ACCESS_KEY:-$(random 20)}
  STORAGE_SECRET_KEY=${STORAGE_SECRET_KEY:-$(random 40)}
fi
for name in DATABASE_HOST DATABASE_PASSWORD STORAGE_ACCESS_KEY STORAGE_SECRET_KEY; do
  eval "value=\${$name:-}"
  [ -n "$value" ] || { echo "secrets: $name is not set. Fix: set it to that of your cloud's Postgres or object store" >&2; exit 2; }
done
# A line break ends a line of the files, and the first two stand in an address.
plain() {
  case $2 in
    *[!$3]*) echo "secrets: $1 has characters that its place cannot hold. Fix: use $4" >&2; exit 2 ;;
  esac
}
plain DATABASE_HOST "$DATABASE_HOST" 'a-zA-Z0-9._:-' "host or host:port"
plain DATABASE_PASSWORD "$DATABASE_PASSWORD" 'a-zA-Z0-9._~-' "letters, digits and . _ ~ -"
plain STORAGE_ACCESS_KEY "$STORAGE_ACCESS_KEY" '!-~' "visible ASCII characters"
plain STORAGE_SECRET_KEY "$STORAGE_SECRET_KEY" '!-~' "visible ASCII characters"

umask 077
# A folder of its own, which only this process removes; renamed when all files are there.
new=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$new"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
admin=$(random 32)
# psycopg 3, by its name: SQLAlchemy's default driver for postgresql:// depends on its version.
address="postgresql+psycopg://$user:$DATABASE_PASSWORD@$DATABASE_HOST"
printf 'uri=%s/mlflow\nauth_uri=%s/mlflow_logins\n' "$address" "$address" > "$new/database.env"
printf 'user=%s\npassword=%s\ndatabase=mlflow\n' "$user" "$DATABASE_PASSWORD" > "$new/postgres.env"
printf 'flask_secret=%s\n' "$(random 64)" > "$new/flask.env"
printf 'access_key=%s\nsecret_key=%s\n' "$STORAGE_ACCESS_KEY" "$STORAGE_SECRET_KEY" > "$new/storage.env"
# The pipelines' login. MLflow's first administrator is also the one that they use until you make others.
printf 'username=vitpipe\npassword=%s\n' "$admin" > "$new/login.env"
cat > "$new/basic_auth.ini" <<INI
[mlflow]
default_permission = READ
database_uri = $address/mlflow_logins
admin_username = vitpipe
admin_password = $admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
[ ! -d "$folder" ] || kept
mv "$new" "$folder"
# mv moves into a folder that another process has just made.
lost=$folder/$(basename "$new")
[ ! -d "$lost" ] || { rm -rf "$lost"; kept; }
echo "secrets: $folder; log in to MLflow as vitpipe with the password in $folder/login.env"
