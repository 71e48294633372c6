#!/bin/bash
#SBATCH --nodes=8 --ntasks-per-node=8 --gpus-per-task=1 --cpus-per-task=8
# 64 GPUs under Slurm: `sbatch slurm.sh`. With several networks set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME too.
export MASTER_PORT=29500 MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
srun --kill-on-bad-exit=1 --cpus-per-task=8 python train.py --data yfcc15m --out runs/yfcc15m-slip "$@"
