#!/usr/bin/env bash
# The bundle on a host that has only glibc, libstdc++, a shell and PyTorch's libraries: a chroot. Needs root.
#   tests/bundle.sh BINARY TORCH FOLDER      TORCH is PyTorch's folder, FOLDER a temporary one
set -euo pipefail
cd "$(dirname "$0")/.."
binary=$1 torch=$2 folder=$3

tools/bundle.sh "$binary" "$folder"
host=$folder/host
mkdir -p "$host"/{bin,lib64,lib,usr,dev,proc,sys,tmp,opt/site/torch,opt/site/nvidia,rldiff}
tar -C "$host/rldiff" --strip-components=1 -xzf "$folder"/rldiff-*.tar.gz

libraries=$(for file in /bin/sh /usr/bin/dirname /usr/bin/env /usr/bin/hostname; do ldd "$file"; done |
    grep -o '/[^ ]*' | sort -u)
for name in libm.so.6 libpthread.so.0 libdl.so.2 librt.so.1 libutil.so.1 libstdc++.so.6 libgcc_s.so.1; do
    # awk reads to the end: where it left early, ldconfig's next line would have no reader, and the script would end
    libraries+=" $(/sbin/ldconfig -p | awk -v n="$name" '$1 == n && /x86-64/ && !found++ {print $NF}')"
done
cp -L $(tr ' ' '\n' <<< "$libraries" | sort -u) "$host/lib/"
cp -L /lib64/ld-linux-x86-64.so.2 "$host/lib64/"
cp -L /bin/sh /usr/bin/dirname /usr/bin/env "$host/bin/"
ln -s ../bin "$host/usr/bin"

# mounts of its own namespace: they are gone when it ends
unshare -m bash -euc '
    host=$1 torch=$2
    mount --bind "$torch" "$host/opt/site/torch"
    mount --bind "$torch/../nvidia" "$host/opt/site/nvidia"
    mount --rbind /dev "$host/dev"
    mount -t proc proc "$host/proc"
    mount --rbind /sys "$host/sys"
    run="chroot $host /bin/env -i PATH=/rldiff/bin:/bin LD_LIBRARY_PATH=/lib RLDIFF_TORCH=/opt/site/torch HOME=/tmp"
    $run /rldiff/rldiff doctor
    $run /rldiff/bin/mpirun -n 2 /rldiff/rldiff --set run.iterations=1 --set run.lanes=2 --set task.parity.samples=32 \
        --set task.composition.samples=4 --set task.preference.samples=4 --set task.parity.evaluation_samples=32 \
        --set task.composition.evaluation_samples=4 --set task.preference.evaluation_samples=4 --out /tmp/run
    if $run RLDIFF_TORCH=/nowhere /rldiff/rldiff doctor; then exit 1; fi
' - "$host" "$torch"
[ -f "$host/tmp/run/summary.json" ]
echo "bundle: ran in a chroot"
