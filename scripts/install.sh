#!/usr/bin/env bash
# Install the project into .venv of this checkout. `make` and the container image both call this.
# PYTHON names the interpreter that makes the environment (default python3); an existing environment keeps its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/installed-from
home=$venv/made-for

say() { printf 'install: %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
pip_install() {
    # Twice quiet: errors are shown, warnings about the reader's own pip set-up are not.
    "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-input --constraint constraints.txt "$@" ||
        fail "pip could not install $*; its message is above. Fix that and run this again: it goes on from here."
}

fingerprint=$(cat pyproject.toml constraints.txt scripts/install.sh | sha256sum | cut -d ' ' -f 1)
if [[ -x $python && -f $stamp && $(<"$stamp") == "$fingerprint $root" ]]; then
    exit 0
fi

# Scripts in a virtual environment hold its absolute path, so a checkout that was moved or copied needs a new one.
if [[ -e $venv ]] && { ! "$python" -c 'import pip._internal.cli.main' 2>/dev/null || { [[ -f $home ]] && [[ $(<"$home") != "$root" ]]; }; }; then
    say "removing .venv, which was made for another folder or interpreter"
    rm -rf "$venv"
fi
rm -f "$stamp"

if [[ ! -x $python ]]; then
    maker=${PYTHON:-python3}
    command -v "$maker" >/dev/null || fail "'$maker' is not installed; install Python 3.10 or newer, or name one: make install PYTHON=/path/to/python"
    "$maker" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "'$maker' is $("$maker" --version 2>&1); Python 3.10 or newer is needed: make install PYTHON=/path/to/python"
    "$maker" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "'$maker' cannot make virtual environments; install its venv package (on Debian and Ubuntu: python3-venv)"
    say "making the virtual environment .venv with $("$maker" --version 2>&1)"
    "$maker" -m venv "$venv"
    printf '%s' "$root" >"$home"
fi

say "1/4 installing PyTorch (the longest step: some minutes, a few GB with CUDA)"
pip_install torch==2.13.0
say "2/4 installing the build tools that DeepSpeed wants to find"
pip_install setuptools wheel ninja py-cpuinfo
say "3/4 installing DeepSpeed from source, its native kernels left for later"
DS_BUILD_OPS=0 pip_install --no-build-isolation deepspeed==0.19.8
say "4/4 installing cel_dist, editable, and everything else it uses"
pip_install --no-build-isolation --editable '.[corpus,onnx,ray,s3,serve,sweep,docs,dev]'

# torchaudio's native part links CUDA and keeps a CPU build from importing; without it torchaudio runs in plain Python.
native=$("$python" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("torchaudio").origin).parent / "lib")')
shopt -s nullglob
if [[ $("$python" -c 'import torch; print(torch.version.cuda)') == None ]]; then
    libraries=("$native"/*.so)
    if ((${#libraries[@]})); then
        say "this PyTorch has no CUDA: setting torchaudio's native libraries aside in torchaudio/lib/set_aside"
        mkdir -p "$native/set_aside"
        mv "${libraries[@]}" "$native/set_aside/"
    fi
else
    libraries=("$native"/set_aside/*.so)
    if ((${#libraries[@]})); then
        say "this PyTorch has CUDA: putting torchaudio's native libraries back"
        mv "${libraries[@]}" "$native/"
    fi
fi
"$python" -c 'import torch, torchaudio' ||
    fail "torch and torchaudio do not import together; remove .venv and run this again"

printf '%s' "$fingerprint $root" >"$stamp"
say "done: .venv is ready; try '.venv/bin/cel --help'"
