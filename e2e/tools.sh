#!/bin/bash
# Fetches and builds the real programs that the tests and the demo run on.
#
#   e2e/tools.sh [all | build | containerd | registry | cluster]...
#
#   build       what compiling the workspace needs (protoc, a C compiler)
#   containerd  private containerds of three versions, and runc
#   registry    docker-registry, skopeo
#   cluster     containerd, Kubernetes, etcd, helm, the judge of objects' health, CNI plugins, iptables, busybox, curl
#   all         all of these (the default)
#
# Debian packages are installed with apt-get; containerd and docker-registry are
# only unpacked, for their packages would start services. Go programs are built
# from the modules in e2e/upstream. Results lie in $TOTE_CACHE (default
# ${XDG_CACHE_HOME:-~/.cache}/tote), one directory for each name and version,
# put there by one rename, so that an interrupted run leaves nothing half done
# and the next one continues. With everything in place it returns at once.
set -euo pipefail
shopt -s inherit_errexit

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
upstream=$here/upstream
cache=${TOTE_CACHE:-${XDG_CACHE_HOME:-${HOME:?set HOME or TOTE_CACHE}/.cache}/tote}
# shellcheck source=upstream/versions
source "$upstream/versions"

die() { printf 'tools.sh: %s\n' "$*" >&2; exit 1; }
say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }

# ---- what was asked for ------------------------------------------------------

declare -A want=()
for group in "${@:-all}"; do
  case $group in
    all) want[build]=1 want[containerd]=1 want[registry]=1 want[cluster]=1 ;;
    cluster) want[containerd]=1 want[cluster]=1 ;;
    build | containerd | registry) want[$group]=1 ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "unknown group \"$group\"; know: all build containerd registry cluster" ;;
  esac
done
wants() { [[ -n ${want[$1]:-} ]]; }

packages=()
if wants build; then
  command -v protoc >/dev/null || packages+=(protobuf-compiler)
  command -v cc >/dev/null || packages+=(gcc libc6-dev)
fi
wants containerd && packages+=(runc iproute2 util-linux)
wants registry && packages+=(skopeo)
wants cluster && packages+=(containernetworking-plugins iptables conntrack busybox-static ca-certificates curl)

# ---- is this a machine that can do it? ---------------------------------------

# at_least WANTED VERSION
at_least() { [[ $(printf '%s\n' "$1" "$2" | sort -V | head -1) == "$1" ]]; }

needs_root() { wants containerd || wants registry || wants cluster; }

check_machine() {
  local missing=() os_id='' os_version=''
  if [[ -r /etc/os-release ]]; then
    os_id=$(. /etc/os-release && echo "${ID:-}")
    os_version=$(. /etc/os-release && echo "${VERSION_ID:-}")
  fi
  # Whoever only compiles may do so anywhere, with what is needed in PATH.
  if [[ $os_id != debian || $os_version != 12 ]] && { needs_root || [[ ${#packages[@]} -gt 0 ]]; }; then
    missing+=("Debian 12 (this is ${os_id:-an unknown system} $os_version)")
  fi
  if needs_root; then
    [[ $(uname -m) == x86_64 ]] || missing+=("an x86_64 machine (this is $(uname -m))")
    [[ $(id -u) == 0 ]] || missing+=("root (you are $(id -un)): run it as root, for namespaces, mounts and cgroups are made")
  fi
  if ! command -v cargo >/dev/null; then
    missing+=("cargo: install Rust, https://rustup.rs")
  else
    local rust
    rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$here/../Cargo.toml")
    at_least "$rust" "$(cargo --version | cut -d' ' -f2)" || missing+=("Rust $rust or later (this is $(cargo --version))")
  fi
  command -v make >/dev/null || missing+=("make: apt-get install make")
  if wants containerd || wants cluster; then
    if ! command -v go >/dev/null; then
      missing+=("go 1.26 or later: https://go.dev/dl")
    else
      local version
      version=$(go env GOVERSION)
      at_least go1.26 "$version" ||
        missing+=("go 1.26 or later (this is $version)")
    fi
    grep -qw overlay /proc/filesystems || modprobe overlay 2>/dev/null ||
      missing+=("overlayfs in the kernel")
    check_cgroups
  fi
  if [[ ${#missing[@]} -gt 0 ]]; then
    printf 'tools.sh: this machine lacks:\n' >&2
    printf '  - %s\n' "${missing[@]}" >&2
    exit 1
  fi
}

# Either the unified hierarchy (v2) or one mount for each controller (v1), and
# writable: a container of one's own often has it read-only.
check_cgroups() {
  local controller root probe
  if [[ $(stat -fc %T /sys/fs/cgroup 2>/dev/null) == cgroup2fs ]]; then
    for controller in cpu cpuset memory pids; do
      grep -qw "$controller" /sys/fs/cgroup/cgroup.controllers ||
        missing+=("the cgroup v2 controller $controller in /sys/fs/cgroup/cgroup.controllers")
    done
    root=/sys/fs/cgroup
  else
    for controller in cpu cpuacct cpuset memory devices freezer pids; do
      mountpoint -q "$(readlink -f "/sys/fs/cgroup/$controller")" ||
        missing+=("the cgroup v1 hierarchy /sys/fs/cgroup/$controller (and it is not cgroup v2 either)")
    done
    root=/sys/fs/cgroup/memory
  fi
  [[ $(id -u) == 0 ]] || return 0
  probe=$root/tote-probe-$$
  if mkdir "$probe" 2>/dev/null; then rmdir "$probe"; else missing+=("a writable cgroup hierarchy at $root"); fi
}

# ---- one at a time, and nothing half done ------------------------------------

lock() {
  mkdir -p "$cache"
  exec 9>"$cache/.lock"
  if ! flock -n 9; then
    say "another tools.sh is at work on $cache; waiting for it"
    flock 9
  fi
  # With the lock held, what lies here was left by a run that was killed.
  rm -rf "$cache"/.tmp.*
}

child='' scratch='' log=''
cleanup() {
  trap - EXIT
  [[ -z $child ]] || kill "$child" 2>/dev/null || true
  [[ -z $scratch ]] || rm -rf "$scratch"
  [[ -z $log ]] || rm -f "$log"
}
trap cleanup EXIT
trap 'cleanup; exit 130' INT
trap 'cleanup; exit 143' TERM HUP

# run WHAT COMMAND...: runs it with its output in a log, says every 15 seconds
# that it is still at it, and shows the log's end if it fails.
run() {
  local what=$1 begin=$SECONDS status=0 said=$SECONDS
  shift
  log=$(mktemp "$cache/.tmp.log.XXXXXX")
  say "$what"
  # It ends with this shell, also if that is killed: what it holds (apt's locks) stands in nobody's way then.
  setpriv --pdeathsig KILL "$@" >"$log" 2>&1 9>&- </dev/null &
  child=$!
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.2 9>&-
    if ((SECONDS - said >= 15)); then
      said=$SECONDS
      say "$what: $((SECONDS - begin)) s so far"
    fi
  done
  wait "$child" || status=$?
  child=''
  if ((status != 0)); then
    tail -n 30 "$log" >&2
    die "$what failed (exit status $status); its last lines are above"
  fi
  rm -f "$log"
  log=''
  say "$what: done in $((SECONDS - begin)) s"
}

# ---- Debian packages ---------------------------------------------------------

missing_packages() {
  local package
  [[ ${#packages[@]} -gt 0 ]] || return 0
  for package in "${packages[@]}"; do
    [[ -e /var/lib/dpkg/info/$package.list || -e /var/lib/dpkg/info/$package:amd64.list ]] &&
      dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -q '^installed' ||
      echo "$package"
  done
}

updated=''
apt_update() {
  [[ -z $updated ]] || return 0
  run "apt-get update" apt-get -q update
  updated=1
}

install_packages() {
  local list=("$@")
  [[ $(id -u) == 0 ]] || die "root is needed to install Debian packages that are missing: ${list[*]}"
  apt_update
  run "apt-get install ${list[*]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 install "${list[@]}"
}

# unpack NAME VERSION PACKAGE: the package's programs, into the cache, without
# installing it, and so without its service.
unpack() {
  local name=$1 version=$2 package=$3
  local dest=$cache/$name-$version
  [[ -e $dest/.complete ]] && return
  apt_update
  scratch=$(mktemp -d "$cache/.tmp.XXXXXX")
  mkdir "$scratch/deb" "$scratch/root"
  # shellcheck disable=SC2016
  run "fetching $package $version from Debian" \
    sh -c 'cd "$1" && apt-get -q -o APT::Sandbox::User=root download "$2" && dpkg-deb -x ./*.deb ../root' - "$scratch/deb" "$package"
  local deb=("$scratch"/deb/*.deb)
  [[ ${deb[0]##*/} == "${package}_$version"* ]] ||
    die "Debian offers ${deb[0]##*/}, and e2e/upstream/versions says $version: correct it there"
  mkdir "$scratch/out"
  mv "$scratch/root/usr/bin" "$scratch/out/bin"
  publish "$dest"
}

publish() {
  local dest=$1
  touch "$scratch/out/.complete"
  rm -rf "$dest"
  mv "$scratch/out" "$dest"
  rm -rf "$scratch"
  scratch=''
}

# ---- Go programs -------------------------------------------------------------

# A built directory is kept while what it was made from is unchanged.
recipe() { (cd "$upstream/$1" && cat ./* && echo "$2 $3") | sha256sum | cut -d' ' -f1; }

built() {
  local name=$1 version=$2
  [[ -e $cache/$name-$version/.complete && $(cat "$cache/$name-$version/.recipe" 2>/dev/null) == "$3" ]]
}

# build NAME VERSION MODULE REQUIRED TAGS LDFLAGS: builds the tools of
# e2e/upstream/MODULE (or its main package) into the cache.
build() {
  local name=$1 version=$2 module=$3 required=$4 tags=$5 ldflags="-s -w $6"
  local recipe
  recipe=$(recipe "$module" "$tags" "$ldflags")
  built "$name" "$version" "$recipe" && return
  if [[ -n $dry ]]; then todo+=("$name $version"); return; fi
  grep -qE "^(require )?[[:space:]]*$required v$version( // indirect)?\$" "$upstream/$module/go.mod" ||
    die "e2e/upstream/$module/go.mod does not require $required v$version, which e2e/upstream/versions names"
  scratch=$(mktemp -d "$cache/.tmp.XXXXXX")
  mkdir -p "$scratch/out/bin"
  local what=. out=$scratch/out/bin/
  grep -q '^tool' "$upstream/$module/go.mod" && what=tool
  run "fetching the Go modules of $name $version" go -C "$upstream/$module" mod download
  run "building $name $version" env CGO_ENABLED=0 GOFLAGS=-mod=readonly GOWORK=off \
    go -C "$upstream/$module" build -trimpath -buildvcs=false -tags "$tags" -ldflags "$ldflags" -o "$out" "$what"
  case $name in
    kubernetes)
      local program
      mv "$scratch/out/bin/kubernetes" "$scratch/out/bin/kube"
      for program in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do
        ln -s kube "$scratch/out/bin/$program"
      done
      ;;
    etcd) mv "$scratch/out/bin/server" "$scratch/out/bin/etcd" ;;
  esac
  echo "$recipe" >"$scratch/out/.recipe"
  publish "$cache/$name-$version"
}

programs() {
  if wants containerd; then
    if [[ -n $dry ]]; then
      [[ -e $cache/containerd-$containerd_debian/.complete ]] || todo+=("containerd $containerd_debian")
    else
      unpack containerd "$containerd_debian" containerd
    fi
    build containerd "$containerd_2" containerd-2 github.com/containerd/containerd/v2 no_btrfs \
      "-X github.com/containerd/containerd/v2/version.Version=v$containerd_2"
    build containerd "$containerd_1_7" containerd-1.7 github.com/containerd/containerd no_btrfs \
      "-X github.com/containerd/containerd/version.Version=v$containerd_1_7"
  fi
  if wants registry; then
    if [[ -n $dry ]]; then
      [[ -e $cache/docker-registry-$docker_registry/.complete ]] || todo+=("docker-registry $docker_registry")
    else
      unpack docker-registry "$docker_registry" docker-registry
    fi
  fi
  if wants cluster; then
    local v=k8s.io/component-base/version minor=${kubernetes#*.}
    build kubernetes "$kubernetes" kubernetes k8s.io/kubernetes "" \
      "-X $v.gitVersion=v$kubernetes -X $v.gitMajor=${kubernetes%%.*} -X $v.gitMinor=${minor%%.*} -X $v.gitTreeState=clean -X $v.gitCommit=v$kubernetes -X $v.buildDate=1970-01-01T00:00:00Z"
    build etcd "$etcd" etcd go.etcd.io/etcd/server/v3 "" ""
    build helm "$helm" helm helm.sh/helm/v3 "" "-X helm.sh/helm/v3/internal/version.version=v$helm"
    build health "$health" health sigs.k8s.io/cli-utils "" ""
  fi
}

# ---- main --------------------------------------------------------------------

dry=1 todo=()
check_machine
programs
mapfile -t absent < <(missing_packages)
if [[ ${#todo[@]} -eq 0 && ${#absent[@]} -eq 0 ]]; then
  exit 0
fi
if [[ ${todo[*]} == *kubernetes* ]]; then
  mkdir -p "$cache"
  free=$(df --output=avail -B1G "$cache" | tail -1)
  ((free >= 10)) || die "building Kubernetes takes 10 GB of disk with Go's caches, and $cache has $((free)) GB free"
fi
say "to do: ${absent[*]:+install ${absent[*]}; }${todo[*]:+build or unpack ${todo[*]} }into $cache"
lock
mapfile -t absent < <(missing_packages)
[[ ${#absent[@]} -eq 0 ]] || install_packages "${absent[@]}"
dry=''
programs
say "everything is in $cache"
