# shellcheck shell=bash
# Settings of a node with 8 H100 GPUs and InfiniBand, read by train.sh. Every line can be set from outside, and says what
# it buys. Sources: [NCCL] docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html, [Megatron] Megatron-Core developer
# guide and README, [torch] docs.pytorch.org, notes on CUDA memory and on ProcessGroupNCCL's environment variables.
#
# What is not here is NCCL's to choose: algorithms, protocols, channels. Its guide warns against keeping such variables in
# scripts; what was right for one release slows down the next.

# One hardware queue: kernels start in the order they were issued, so that the communication of tensor and sequence
# parallelism is under way before the matrix product that should hide it [Megatron]. Needed on GPUs before Blackwell; set
# it to 32 for runs with context parallelism only, or with FSDP, where one queue holds communication up.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Memory segments that grow: less is lost to fragmentation, which the micro-batches of a pipeline cause [torch].
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# Warnings only: what NCCL says of a broken link is worth a line in the log [NCCL].
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# How long a packet may stay unanswered, 4.096 us x 2^22 = 17 s, and how often it is sent again: a flapping link, or a
# switch that starts anew, does not end a run of 512 GPUs [NCCL].
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
export NCCL_IB_RETRY_CNT="${NCCL_IB_RETRY_CNT:-7}"

# All-reduce inside the NVLink switch instead of the GPUs: faster on H100 with NVSwitch, for some GiB of memory. NCCL turns
# it on by itself; set 0 where memory is short [NCCL].
if [[ -n ${NCCL_NVLS_ENABLE:-} ]]; then export NCCL_NVLS_ENABLE; fi

# Which network cards carry the traffic, and which interface the first connection takes. NCCL finds both on most clusters;
# name them where there are others that lead nowhere, such as a storage card or docker0: NCCL_IB_HCA==mlx5_0,mlx5_3
# NCCL_SOCKET_IFNAME==bond0 [NCCL]. GLOO_SOCKET_IFNAME is the same for the CPU's groups, which carry checkpoints' agreements.
if [[ -n ${NCCL_IB_HCA:-} ]]; then export NCCL_IB_HCA; fi
if [[ -n ${NCCL_SOCKET_IFNAME:-} ]]; then
    export NCCL_SOCKET_IFNAME
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-${NCCL_SOCKET_IFNAME#=}}"
fi

# On RoCE, not on InfiniBand: the address table's entry that routes, RoCE v2 over IPv4 (show_gids lists them) [NCCL].
if [[ -n ${NCCL_IB_GID_INDEX:-} ]]; then export NCCL_IB_GID_INDEX; fi
