#!/usr/bin/env bash
# Installs, into a venv of its own, the Python packages that tests compare with: diffusers, transformers, h5py,
# tensorboard; and selenium, which drives a browser. They use the libtorch wheel of tools/setup.sh; prints the path of the Python to use. And NVRTC with CUDA's
# headers (230 MB), which compiles the kernels for a test; that needs no GPU.
# Needs RLDIFF_VENV (the project's venv, already set up).
set -euo pipefail

project=${RLDIFF_VENV:?the Makefile sets it}
venv=$project-tests
python=$venv/bin/python-for-tests
stamp=$venv/.rldiff-setup
wanted=$(cksum < "$0")
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "$python"
    exit 0
fi

torch_packages=$(echo "$project"/lib/python3*/site-packages)
if [ ! -d "$torch_packages/torch" ]; then
    echo "set-up of tests: LIBTORCH is set, so there is no Python torch here; tests that compare with it are skipped" >&2
    exit 0
fi
echo "set-up of tests: installing diffusers, transformers, peft, h5py, tensorboard, selenium, NVRTC" >&2
python3 -m venv "$venv"
install=("$venv/bin/pip" install --quiet --disable-pip-version-check)
"${install[@]}" numpy h5py pillow safetensors psutil filelock typing-extensions sympy networkx jinja2 fsspec \
    tensorboard "selenium>=4.20,<5" transformers==4.57.6 diffusers==0.39.0
"${install[@]}" --no-deps peft==0.18.0 accelerate==1.12.0 nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-runtime==13.0.96

# torch from the project's venv, last on the path
test_packages=$(echo "$venv"/lib/python3*/site-packages)
echo "$torch_packages" > "$test_packages/rldiff-torch.pth"

# The CPU set-up leaves CUDA's libraries out, but Python's torch names them all. Nothing calls them without a GPU, so
# empty libraries of the same names, bound lazily, are enough.
empty=$venv/empty-libraries
mkdir -p "$empty"
find_missing() {
    LD_LIBRARY_PATH=$empty ldd "$torch_packages"/torch/lib/libtorch_{python,cuda,cuda_linalg,nvshmem}.so 2>/dev/null |
        awk '/not found/ {print $1}' | sort -u
}
find_missing | while read -r name; do
    echo | g++ -shared -x c++ - -o "$empty/$name" -Wl,-soname,"$name"
done
cat > "$test_packages/sitecustomize.py" <<'PYTHON'
import os
import sys

sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
PYTHON
cat > "$python" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH="$empty\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}" exec "$venv/bin/python" "\$@"
WRAPPER
chmod +x "$python"
printf '%s' "$wanted" > "$stamp"
echo "$python"
