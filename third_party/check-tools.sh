#!/bin/sh
# Says which tools this machine lacks to build kv.run, and how to get each. Exit 0: nothing is missing. Exit 10: something is.
set -u
python=${PYTHON:-python3}
missing=0

lack() { # what, why, how
    printf '  missing: %s\n    needed for: %s\n    get it: %s\n' "$1" "$2" "$3" >&2
    missing=1
}

command -v git >/dev/null 2>&1 || lack "git" "the version stamp of a build" "apt install git | dnf install git | xcode-select --install"
command -v "${CXX:-c++}" >/dev/null 2>&1 || lack "a C++17 compiler (${CXX:-c++})" "the native kernels" \
    "apt install g++ | dnf install gcc-c++ | xcode-select --install, or set CXX to yours"

if ! command -v cargo >/dev/null 2>&1; then
    lack "Rust 1.88 or newer (cargo)" "launcher, router and benchmark" "the rustup installer from rust-lang.org, then open a new shell"
else
    version=$(rustc --version 2>/dev/null | cut -d' ' -f2)
    if ! printf '1.88.0\n%s\n' "$version" | sort -V -C; then
        lack "Rust 1.88 or newer (found $version)" "launcher, router and benchmark" "rustup update stable"
    fi
fi

if ! command -v "$python" >/dev/null 2>&1; then
    lack "Python 3.10 or newer ($python)" "the model shards" "apt install python3 python3-venv | dnf install python3, or set PYTHON to yours"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    lack "Python 3.10 or newer (found $("$python" --version 2>&1))" "the model shards" "install a newer python3 and set PYTHON to it"
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    lack "Python's venv module" "the local environment .venv" "apt install python3-venv"
fi

[ "$missing" -eq 0 ] || { echo "kv.run cannot be built yet: install what is listed above and run the same command again." >&2; exit 10; }
