#!/bin/bash
# sbatch examples/launch/slurm.sh my.yaml [key=value ...]
#SBATCH --job-name=mindvl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# SIGTERM two minutes before the end saves a checkpoint; the requeued job goes on from it.
set -euo pipefail
config=$1
shift
srun mindvl train --config "$config" --set distributed.coordinator=auto mesh.fsdp=-1 "$@"
