#!/usr/bin/env bash
# Installs into a venv in the project folder what the build needs and the machine does not provide: libtorch, an MPI,
# libclang and cmake. Done once; done again when this file changes. Needs Python 3 with venv, Rust, g++ and make.
set -euo pipefail

venv=${RLDIFF_VENV:?the Makefile sets it}
stamp=$venv/.rldiff-setup
# which libtorch: RLDIFF_CUDA=1 or 0 says it; a login node that builds for others has no driver
cuda=${RLDIFF_CUDA:-}
[ -n "$cuda" ] || { [ -e /proc/driver/nvidia/version ] && cuda=1 || cuda=0; }
wanted="$(cksum < "$0") torch=${LIBTORCH:-venv} cuda=$cuda mpi=${MPICC:-venv} hdf5=${HDF5_DIR:-source} clang=${LIBCLANG_PATH:-venv}"
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

fail() { # what failed, how to mend it
    printf 'set-up: %s\n        %s\n' "$1" "$2" >&2
    exit 1
}
say() { printf 'set-up: %s\n' "$1" >&2; }

command -v cargo >/dev/null || fail "cargo is missing" "install Rust 1.86 or later (rustup, or your distribution's package)"
command -v g++ >/dev/null || fail "g++ is missing" "install a C++17 compiler (Debian, Ubuntu: apt-get install g++)"
command -v python3 >/dev/null || fail "python3 is missing" "install Python 3.9 or later with venv (apt-get install python3-venv)"
[ "$cuda" = 0 ] || [ "$cuda" = 1 ] ||
    fail "RLDIFF_CUDA=$cuda is neither 0 nor 1" "1 installs libtorch with CUDA, 0 without; unset it to go by the driver"
[ -z "${LIBTORCH:-}" ] || [ -f "$LIBTORCH/lib/libtorch_cpu.so" ] ||
    fail "LIBTORCH=$LIBTORCH holds no lib/libtorch_cpu.so" "point it at libtorch 2.11.0, or unset it to install one here"
[ -z "${MPICC:-}" ] || command -v "$MPICC" >/dev/null ||
    fail "MPICC=$MPICC is not a program" "point it at your MPI's compiler wrapper, or unset it to install one here"
[ -z "${HDF5_DIR:-}" ] || [ -d "$HDF5_DIR/include" ] ||
    fail "HDF5_DIR=$HDF5_DIR holds no include folder" "point it at an HDF5 installation, or unset it to build one here"

if [ ! -x "$venv/bin/pip" ]; then
    say "creating a Python environment in $venv"
    python3 -m venv "$venv" || fail "python3 -m venv failed" "install the venv module (Debian, Ubuntu: apt-get install python3-venv)"
fi
install() { # what, pip arguments…
    say "installing $1"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "${@:2}" ||
        fail "pip could not install $1" "check the network and the package index that pip is set to, then run make again"
}
if [ -z "${LIBTORCH:-}" ]; then
    # Without an NVIDIA driver the CUDA libraries would be 3.5 GB for nothing; these two are what libtorch loads at start.
    if [ "$cuda" = 1 ]; then
        install "libtorch 2.11.0 with CUDA (about 5 GB)" torch==2.11.0 numpy
    else
        install "libtorch 2.11.0 for the CPU (1.3 GB)" --no-deps torch==2.11.0 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85
    fi
fi
[ -n "${MPICC:-}" ] || install "MPICH 5.0.2" --no-deps mpich==5.0.2
[ -n "${LIBCLANG_PATH:-}" ] || install "libclang 18 (reads the headers of MPI and HDF5)" --no-deps libclang==18.1.1
[ -n "${HDF5_DIR:-}" ] || install "cmake (builds HDF5)" --no-deps "cmake>=3.26,<4.3"

printf '%s' "$wanted" > "$stamp"
say "done; the first build takes 5 to 10 minutes on 2 cores"
