# shellcheck shell=bash
# Settings of a node with 8 H100 GPUs and InfiniBand, read by train.sh. Variables that are already set take precedence.
# Source: [NCCL] docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html.
#
# Algorithms, protocols and channels are not set: NCCL chooses them. Its guide warns against such variables in scripts,
# because a good choice for one release slows down the next. `train` and `launch` set what CUDA itself reads, such as
# CUDA_DEVICE_MAX_CONNECTIONS (docs/operations/speed.md).

# Warnings only: a failing link is worth a line in the log [NCCL].
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Timeout of a packet, 4.096 us x 2^22 = 17 s, and number of retries: a flapping link or a restarting switch does not
# end a run of 512 GPUs [NCCL].
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
export NCCL_IB_RETRY_CNT="${NCCL_IB_RETRY_CNT:-7}"

# All-reduce in the NVLink switch instead of the GPUs: faster on H100 with NVSwitch, for some GiB of memory. NCCL turns
# it on automatically; set 0 if memory is short [NCCL].
if [[ -n ${NCCL_NVLS_ENABLE:-} ]]; then export NCCL_NVLS_ENABLE; fi

# Network cards for the traffic, and the interface for the first connection. NCCL finds both on most clusters. Name them
# if others lead nowhere, such as a storage card or docker0: NCCL_IB_HCA==mlx5_0,mlx5_3 NCCL_SOCKET_IFNAME==bond0
# [NCCL]. GLOO_SOCKET_IFNAME is the interface of the CPU's process groups, which checkpoints use.
if [[ -n ${NCCL_IB_HCA:-} ]]; then export NCCL_IB_HCA; fi
if [[ -n ${NCCL_SOCKET_IFNAME:-} ]]; then
    export NCCL_SOCKET_IFNAME
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-${NCCL_SOCKET_IFNAME#=}}"
fi

# For RoCE, not InfiniBand: the index of the routable address, RoCE v2 over IPv4 (show_gids lists them) [NCCL].
if [[ -n ${NCCL_IB_GID_INDEX:-} ]]; then export NCCL_IB_GID_INDEX; fi
