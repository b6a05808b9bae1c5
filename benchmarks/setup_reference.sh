#!/usr/bin/env bash
# Build the environment of the reference implementation: setup_reference.sh FOLDER
# fairchem-core 1.10.0 declares torch 2.4. To compare both implementations under one torch, it goes in without its
# declared dependencies, beside the ones it imports (scipy < 1.15: newer ones lack sph_harm). torch-scatter has no
# wheel for this torch and is compiled.
set -euo pipefail
folder=${1:?usage: setup_reference.sh FOLDER}
constraints=$(dirname "$0")/reference-constraints.txt
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
    echo "error: the reference needs Python 3.11 or 3.12, $("$python" --version) given; run make benchmark PYTHON=python3.11" >&2
    exit 1
}
[ -x "$folder/bin/pip" ] || "$python" -m venv --clear "$folder"
pip() { "$folder/bin/python" -m pip "$@" --constraint "$constraints"; }

echo "reference environment 1/4: torch and NumPy"
pip install --quiet --upgrade pip setuptools wheel ninja
pip install --quiet torch numpy scipy
echo "reference environment 2/4: the dependencies of fairchem-core"
pip install --quiet ase e3nn huggingface-hub hydra-core lmdb numba orjson pydantic pymatgen submitit tabulate \
    tensorboard torch-geometric torchtnt tqdm wandb
echo "reference environment 3/4: compiling torch-scatter, which takes several minutes"
pip install --quiet --no-build-isolation --no-deps torch-scatter
echo "reference environment 4/4: fairchem-core"
pip install --quiet --no-deps fairchem-core
"$folder/bin/python" -c 'import fairchem.core, torch_scatter'
