#!/bin/sh
# Collect the packages that benchmarks/gpu.py needs beyond torch, transformers, peft, pyarrow and pillow with what these bring:
#   benchmarks/gpu_wheels.sh FOLDER [PYTHON]
# PYTHON is the version on the machine with the card, 3.12.3 unless said. Versions are those of constraints.txt; x86-64 Linux; 31 MB.
set -eu
folder=${1:?"usage: gpu_wheels.sh FOLDER [PYTHON]"}
python=${2:-3.12.3}
here=$(cd "$(dirname "$0")" && pwd)

model="diffusers importlib_metadata zipp requests urllib3 idna charset-normalizer certifi sentencepiece protobuf"
settings="pydantic pydantic_core annotated-types typing-inspection"
captions="ftfy wcwidth beautifulsoup4 soupsieve"
rows="xxhash"
curves="matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six"

mkdir -p "$folder"
# shellcheck disable=SC2086
"${PIP:-$here/../.venv/bin/pip}" download --quiet --no-deps --only-binary=:all: \
  --implementation cp --python-version "$python" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 \
  --constraint "$here/../constraints.txt" --dest "$folder" \
  $model $settings $captions $rows $curves
du -sh "$folder"
