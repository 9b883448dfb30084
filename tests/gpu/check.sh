#!/usr/bin/env bash
# What only a GPU can show, in about ten minutes: bash tests/gpu/check.sh FOLDER [PYTHON] [PRESET]
#
# FOLDER has some 200 images and masks in images/ and masks/. Each part prints as it goes and has a time limit; if one
# fails, the others still run. Everything is written to ./gpu-check/. PRESET toy tries the script on a CPU.
set -uo pipefail
data=$(realpath "$1") python=${2:-python} network="--random-weights --preset ${3:-large}" here=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH=$here:$here/cache:$here/cli${PYTHONPATH:+:$PYTHONPATH}
mkdir -p gpu-check/nine/images gpu-check/nine/masks && cd gpu-check
for image in $(find "$data/images" -type f | sort | head -9); do
    cp "$image" nine/images/ && cp "$data/masks/$(basename "${image%.*}").png" nine/masks/
done

part() { # part SECONDS COMMAND...
    echo "== $(date +%T) ${*:2}"
    timeout "$@" || echo "FAILED with status $?: ${*:2}"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || echo "no GPU"
# Exact: every row has to be 0.
part 60 "$python" -m dsu cache-features nine $network --views none --cache-root stores
part 120 "$python" -m dsu check-equivalence nine $network --views none --cache-root stores --batch-size 3 \
    --deterministic --steps 6
part 120 "$python" -m pytest -q -m gpu -p no:cacheprovider "$here/tests/dsu/test_runtime.py" "$here/tests/dsu/test_graphs.py"
# Fast: steps (kernels, graph and eager), stage one and prediction against the encoders alone, the disk.
part 150 "$python" -m dsu bench $network --parts stages --json stages.json
part 240 "$python" -m dsu bench $network --parts steps --rounds 1 --json steps.json
# As a user: a store, a head, and masks end to end.
part 120 "$python" -m dsu cache-features "$data" $network --cache-root stores
part 120 "$python" -m dsu train-head "$data" $network --cache-root stores --epochs 3 --out run
part 90 "$python" -m dsu predict "$data/images" --head run --end-to-end --out masks
date +%T
