"""Loaded by every Python of GPU tests that share a GPU: puts all ranks on the first one, each on a host of its own.

NCCL refuses two ranks of one host on one GPU. It tells hosts apart by NCCL_HOSTID, and between hosts uses sockets.
"""

import os

if "LOCAL_RANK" in os.environ:
    os.environ.update(
        LOCAL_RANK="0",
        CUDA_VISIBLE_DEVICES="0",
        NCCL_HOSTID=f"rank{os.environ['RANK']}",
        NCCL_SOCKET_IFNAME="lo",
        NCCL_IB_DISABLE="1",
    )
