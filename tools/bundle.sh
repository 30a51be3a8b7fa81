#!/usr/bin/env bash
# Packs what another host needs to run rldiff: the binary (kernels and miniature are inside), MPICH with its launcher,
# the experiments. That host brings glibc, Python with PyTorch 2.11, and for GPUs NVIDIA's driver.
#   tools/bundle.sh BINARY FOLDER      FOLDER/rldiff-VERSION-ARCHITECTURE.tar.gz
set -euo pipefail
cd "$(dirname "$0")/.."
binary=$1 folder=$2
limit=$((64 * 1000 * 1000))

venv=${RLDIFF_VENV:?the Makefile sets it}
[ -f "$venv/lib/libmpi.so.12" ] && [ "${MPICC:-$venv/bin/mpicc}" = "$venv/bin/mpicc" ] || {
    echo "bundle: it packs the MPICH that the set-up installs; build without MPICC first" >&2
    exit 2
}
version=$("$binary" --version | awk '{print $2}')
name=rldiff-$version-$(uname -m)
bundle=$folder/$name
rm -rf "$bundle" "$bundle.tar.gz"
mkdir -p "$bundle"/{bin,libexec/lib}

cp "$binary" "$bundle/libexec/rldiff"
strip "$bundle/libexec/rldiff"
# the binary looks in $ORIGIN/lib first; MPICH's own libraries find each other beside themselves
cp -L "$venv/lib/libmpi.so.12" "$bundle/libexec/lib/"
cp -a "$venv/lib/mpich" "$bundle/libexec/lib/"
find "$bundle/libexec/lib" -name '*.so*' -type f -exec strip --strip-unneeded {} +
cp -L "$venv/bin/mpiexec" "$bundle/bin/mpirun"
cp -L "$venv/bin/hydra_pmi_proxy" "$bundle/bin/"
strip "$bundle"/bin/*
cp -a slurm LICENSE README.md CHANGELOG.md "$bundle/"

cat > "$bundle/rldiff" <<'WRAPPER'
#!/bin/sh
# Starts rldiff with the libraries of this host's PyTorch 2.11: RLDIFF_TORCH names its folder, else python3 is asked.
here=$(cd "$(dirname "$0")" && pwd)
torch=${RLDIFF_TORCH:-$(python3 -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("torch").origin))' 2>/dev/null)}
if [ ! -f "$torch/lib/libtorch_cpu.so" ]; then
    echo "error: PyTorch 2.11 was not found: set RLDIFF_TORCH to its folder (the one that holds lib/libtorch_cpu.so)" >&2
    exit 2
fi
nvidia=$torch/../nvidia
LD_LIBRARY_PATH=$torch/lib:$nvidia/cu13/lib:$nvidia/nccl/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
exec "$here/libexec/rldiff" "$@"
WRAPPER
chmod +x "$bundle/rldiff"

tar -C "$folder" -czf "$bundle.tar.gz" "$name"
unpacked=$(du -sb "$bundle" | cut -f1)
packed=$(stat -c %s "$bundle.tar.gz")
[ "$unpacked" -lt "$limit" ] || { echo "bundle: $unpacked bytes, more than $limit" >&2; exit 1; }
glibc=$(objdump -T "$bundle/libexec/rldiff" "$bundle"/libexec/lib/libmpi.so.12 | grep -o "GLIBC_[0-9.]*" | sort -uV | tail -n 1)
echo "$bundle.tar.gz: $((packed / 1000000)) MB, $((unpacked / 1000000)) MB unpacked, needs ${glibc/_/ }"
