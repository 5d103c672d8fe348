#!/bin/bash
# On every host: HOSTS=2 HOST=0 MASTER=first-host bash examples/launch/torchrun.sh my.yaml [key=value ...]
# One process a host for GPUs: JAX drives all devices of its process.
set -euo pipefail
config=$1
shift
torchrun --nnodes "${HOSTS:-1}" --node-rank "${HOST:-0}" --nproc-per-node 1 --master-addr "${MASTER:-localhost}" --master-port "${PORT:-29500}" \
  train.py --config "$config" --set distributed.coordinator=auto mesh.fsdp=-1 "$@"
