#!/usr/bin/env bash
# Build the CPU image without a container engine: buildah in a chroot, as root. With --check, also run it and score a picture.
#
#   deploy/build-cpu-image.sh [--check] [IMAGE]        IMAGE is punchline:cpu unless named
#   buildah push punchline:cpu docker-archive:punchline-cpu.tar:punchline:cpu && docker load -i punchline-cpu.tar
#
# It needs buildah and, unless BASE is set, debootstrap; --check needs curl and iproute2, and root for its own namespaces.
#
#   BASE          Debian or Ubuntu image to build on; unset: a Debian bookworm is made by debootstrap, no registry needed
#   MIRROR        the Debian mirror for that; unset: debootstrap's own
#   STORAGE       where buildah keeps images; unset: its own place
#   WHEELS        host directories with wheels or indexes, colons between, seen by the build under their own paths; the CPU torch is
#                 then expected among them (or set TORCH_CPU_INDEX)
#   PIP_CONFIG_FILE, PIP_CERT, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, PIP_TRUSTED_HOST,
#   PIP_DEFAULT_TIMEOUT    as pip knows them; used for the build, not kept in the image
#
# What --check serves: the demo, or
#   MODEL, BASE_MODEL   an artifact's directory, and its base model's if the artifact does not hold it
#   PICTURE             what to score; unset: the first of app/demo/cartoons
#   VENV                an environment whose scores must agree (.venv); left out if it does not exist
set -euo pipefail
cd "$(dirname "$0")/.."

check=
[ "${1-}" = --check ] && { check=1; shift; }
needed=(buildah)
[ -n "${BASE-}" ] || needed+=(debootstrap)
[ -z "$check" ] || needed+=(curl ip)
for tool in "${needed[@]}"; do
    command -v "$tool" >/dev/null || { echo "$0 needs $tool" >&2; exit 1; }
done
image=${1:-punchline:cpu}
pip_variables=(PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX PIP_TRUSTED_HOST PIP_DEFAULT_TIMEOUT)
address=http://127.0.0.1:8000
captions=("The penguin brought an umbrella to the office." "A picture of a thing.")
work=$(mktemp -d "${TMPDIR:-/var/tmp}/punchline-image.XXXXXX")
export BUILDAH_ISOLATION=chroot
container=
server=

cleanup() {
    [ -z "$server" ] || kill -KILL "$server" 2>/dev/null || true
    [ -z "$container" ] || in_store rm "$container" >/dev/null || true
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT

say() { printf '\n== %s\n' "$*"; }
fail() {
    [ ! -s "$work/server.log" ] || cat "$work/server.log" >&2
    printf 'build-cpu-image: %s\n' "$*" >&2
    exit 1
}

in_store() {
    buildah ${STORAGE:+--root "$STORAGE/root" --runroot "$STORAGE/run"} "$@"
}

# Prints the name of an image made from a fresh Debian bookworm, as slim as the official one.
debian_base() {
    local root=$work/debian name=localhost/punchline-debian:bookworm mirror draft
    in_store inspect --type image "$name" >/dev/null 2>&1 && { echo "$name"; return; }
    debootstrap --variant=minbase bookworm "$root" ${MIRROR:+"$MIRROR"} >"$work/debootstrap.log" ||
        { tail -5 "$work/debootstrap.log" >&2; return 1; }
    mirror=$(awk '$1 == "deb" { print $2; exit }' "$root/etc/apt/sources.list")
    printf 'deb %s main\n' "$mirror bookworm-updates" "$mirror-security bookworm-security" >>"$root/etc/apt/sources.list"
    printf '%s\n' 'APT::Keep-Downloaded-Packages "false";' 'Dir::Cache { pkgcache ""; srcpkgcache ""; };' 'Acquire::Languages "none";' \
        'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };' >"$root/etc/apt/apt.conf.d/slim"
    printf 'path-exclude /usr/share/%s/*\n' doc man info locale >"$root/etc/dpkg/dpkg.cfg.d/slim"
    rm -rf "$root"/usr/share/{doc,man,info,locale}/* "$root"/var/cache/apt/*
    draft=$(in_store from scratch)
    in_store add --quiet "$draft" "$root" / >/dev/null
    in_store run "$draft" -- sh -ec 'apt-get update && apt-get upgrade -y && rm -rf /var/lib/apt/lists/*' >&2
    in_store config --cmd bash "$draft"
    in_store commit --quiet --format docker --rm "$draft" "$name" >/dev/null
    echo "$name"
}

build() {
    local base=$1 arguments=(--layers --force-rm --format docker) mounts=() directories=() directory name
    for name in "${pip_variables[@]}"; do [ -z "${!name-}" ] || arguments+=(--build-arg "$name=${!name}"); done
    [ -z "${PIP_CONFIG_FILE-}" ] || arguments+=(--secret "id=pip.conf,src=$PIP_CONFIG_FILE")
    [ -z "${WHEELS-}${TORCH_CPU_INDEX-}" ] || arguments+=(--build-arg "TORCH_CPU_INDEX=${TORCH_CPU_INDEX-}")
    [ -z "${PIP_CERT-}" ] || { arguments+=(--build-arg PIP_CERT=/run/pip-cert.pem); mounts+=(--volume "$PIP_CERT:/run/pip-cert.pem:ro"); }
    [ -z "${WHEELS-}" ] || IFS=: read -ra directories <<<"$WHEELS"
    for directory in "${directories[@]}"; do mounts+=(--volume "$directory:$directory:ro"); done
    # The two GPU bases are named only because old builders look at every stage.
    arguments+=(--build-arg VARIANT=cpu --build-arg "CPU_BASE=$base" --build-arg "GPU_BASE=$base" --build-arg "GPU_BUILD_BASE=$base")
    arguments+=(--build-arg "VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' app/__init__.py)")
    arguments+=(--build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || true)")
    # First the stage that needs the mounts, then the rest without them: every stage that runs something keeps their mount points.
    TMPDIR=$work in_store build "${arguments[@]}" "${mounts[@]}" --target dependencies .
    TMPDIR=$work in_store build "${arguments[@]}" --tag "$image" .
}

# image_config FIELD: the lines of a field of the image's configuration, docker's names.
image_config() {
    in_store inspect --type image --format '{{range .Docker.Config.'"$1"'}}{{println .}}{{end}}' "$image" | sed '/^$/d'
}

# Reads how the image wants to be run.
read_image() {
    user=$(in_store inspect --type image --format '{{.Docker.Config.User}}' "$image")
    mapfile -t environment < <(image_config Env)
    mapfile -t command < <(image_config Entrypoint; image_config Cmd)
    mapfile -t probe < <(image_config Healthcheck.Test)
    [ "${probe[0]-}" = CMD ] || fail "the image has no health check of exec form"
}

# Runs the image's own command as `docker run --read-only --tmpfs /tmp --network none` would: process 1 of its namespace, with the
# image's user and environment. The calling subshell becomes `unshare`, whose one child is that process.
start() {
    local root=$1 mounts=()
    environment+=(HOME=/home/punchline)
    [ -z "${MODEL-}" ] || { mounts+=("$MODEL" /model); environment+=(PUNCHLINE_MODEL=/model); mkdir -p "$root/model"; }
    [ -z "${BASE_MODEL-}" ] || { mounts+=("$BASE_MODEL" /base); environment+=(PUNCHLINE_BASE_MODEL=/base); mkdir -p "$root/base"; }
    # shellcheck disable=SC2016
    exec unshare --mount --pid --net --fork --kill-child sh -eu -c '
        root=$1 user=$2 mounts=$3; shift 3
        mount --bind "$root" "$root"
        while [ "$mounts" -gt 0 ]; do mount --bind -o ro "$1" "$root$2"; shift 2; mounts=$((mounts - 2)); done
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount -t tmpfs tmpfs "$root/tmp"
        mount -o remount,bind,ro "$root"
        ip link set lo up
        exec chroot --userspec="$user" --groups= "$root" /usr/bin/env -i "$@"
    ' start "$root" "$user" "${#mounts[@]}" "${mounts[@]}" "${environment[@]}" "${command[@]}"
}

# inside COMMAND..: on the host's files, in the server's network.
inside() { nsenter --target "$server" --net -- "$@"; }

# Waits for /readyz; fails if the server leaves first.
wait_until_ready() {
    local outer=$1
    for _ in $(seq 300); do
        kill -0 "$outer" 2>/dev/null || fail "the server left before it was ready"
        server=$(pgrep --parent "$outer") && inside curl --noproxy '*' -fsS $address/readyz 2>/dev/null && return
        sleep 1
    done
    fail "the server was not ready in 300 seconds"
}

# agree SERVED LOCAL: the answer has its shape, and its scores are the local ones if there are any.
agree() {
    python3 - "$@" <<'PYTHON'
import json, math, sys
served, *local = [json.load(open(path)) for path in sys.argv[1:]]
scores = served["scores"]
assert set(scores) == {"a", "b"} and all(math.isfinite(score) for score in scores.values()), served
assert served["preferred"] in {"a", "b", "tie"} and 0 <= served["probability_a"] <= 1, served
assert math.isclose(served["margin"], scores["a"] - scores["b"], abs_tol=1e-6), served
assert len(served["model_fingerprint"]) == 64 and served["request_id"] and served["image_id"].startswith("sha256:"), served
print("image:", json.dumps({name: served[name] for name in ("preferred", "probability_a", "margin", "scores")}))
if local:
    print("local:", json.dumps(local[0]["scores"]))
    worst = max(abs(scores[name] - local[0]["scores"][name]) for name in "ab")
    print(f"largest difference: {worst:.1e}")
    assert worst <= 1e-4, "the image and the local environment disagree"
PYTHON
}

run_check() {
    local root outer user environment command probe code=0
    local picture=${PICTURE:-$(find app/demo/cartoons -name '*.png' 2>/dev/null | sort | head -1)}
    local punchline=${VENV:-.venv}/bin/punchline answers=("$work/served.json")
    [ -n "$picture" ] || fail "there is no demo yet: set MODEL and PICTURE"
    container=$(in_store from "$image")
    root=$(in_store mount "$container")
    say "run $image: read-only, no network, process 1"
    read_image
    start "$root" >"$work/server.log" 2>&1 &
    outer=$!
    wait_until_ready "$outer"
    echo
    inside chroot "$root" /usr/bin/env -i "${environment[@]}" "${probe[@]:1}" || fail "the image's health check failed"
    echo "the image's health check passes"
    inside curl --noproxy '*' -fsS $address/compare \
        -F "image=@$picture" -F "a=${captions[0]}" -F "b=${captions[1]}" >"${answers[0]}"
    if [ -x "$punchline" ]; then
        "$punchline" compare "$picture" "${captions[@]}" --json \
            ${MODEL:+--model "$MODEL"} ${BASE_MODEL:+--base-model "$BASE_MODEL"} >"$work/local.json"
        answers+=("$work/local.json")
    fi
    agree "${answers[@]}"
    kill -TERM "$server"
    wait "$outer" || code=$?
    server=
    cat "$work/server.log"
    [ "$code" = 0 ] || fail "exit code $code after SIGTERM"
    echo "exit code 0 after SIGTERM"
}

base=${BASE-}
[ -n "$base" ] || { say "Debian base by debootstrap"; base=$(debian_base); }
say "build $image on $base"
build "$base"
say "built"
in_store images "$image"
[ -z "$check" ] || run_check
