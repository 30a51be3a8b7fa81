# The build's environment; sourced by the Makefile after tools/setup.sh. What the user has set wins.
# Needs RLDIFF_VENV (the project's venv).

site_packages=$(echo "$RLDIFF_VENV"/lib/python3*/site-packages)

if [ -z "${LIBTORCH:-}" ]; then
    export LIBTORCH="$site_packages/torch"
fi
if [ -z "${MPICC:-}" ]; then
    export MPICC="$RLDIFF_VENV/bin/mpicc"
fi
if [ -z "${LIBCLANG_PATH:-}" ] && [ -d "$site_packages/clang/native" ]; then
    export LIBCLANG_PATH="$site_packages/clang/native"
    # the wheel lacks what a compiler brings along, such as stddef.h, which mpi.h of other MPIs asks for
    [ "$MPICC" = "$RLDIFF_VENV/bin/mpicc" ] ||
        export BINDGEN_EXTRA_CLANG_ARGS="${BINDGEN_EXTRA_CLANG_ARGS:--isystem $(g++ -print-file-name=include)}"
fi
if [ -x "$RLDIFF_VENV/bin/cmake" ]; then
    export PATH="$PATH:$RLDIFF_VENV/bin"
fi

# folder of libmpi, so that the binary finds it without any environment
mpi_bin=$(cd "$(dirname "$(command -v "$MPICC")")" && pwd)
export RLDIFF_RPATH="${mpi_bin%/bin}/lib"
# where several MPIs share a folder, their programs have a suffix: mpicc.openmpi, mpirun.openmpi
mpirun=$mpi_bin/mpirun${MPICC##*mpicc}
[ -x "$mpirun" ] || mpirun=$mpi_bin/mpirun
export RLDIFF_MPIRUN="${RLDIFF_MPIRUN:-$mpirun}"

# Open MPI refuses more ranks than cores, and root, unless told otherwise
if [ -z "${RLDIFF_MPIRUN_FLAGS+set}" ]; then
    RLDIFF_MPIRUN_FLAGS=""
    if "$RLDIFF_MPIRUN" --version 2>/dev/null | grep -qi "open.\?mpi\|open-rte"; then
        RLDIFF_MPIRUN_FLAGS="--oversubscribe"
        [ "$(id -u)" = 0 ] && RLDIFF_MPIRUN_FLAGS="$RLDIFF_MPIRUN_FLAGS --allow-run-as-root"
    fi
    export RLDIFF_MPIRUN_FLAGS
fi
