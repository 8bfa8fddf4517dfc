"""Which of the processes of its host this one is, as its launcher says. Needs nothing that could be missing."""

import os

PLACES = (
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
    "PMIX_RANK",
)
"""Variables that say it: common ones, of Open MPI, MVAPICH, MPICH, Slurm; and the rank, where nothing else is said."""


def is_first_of_host() -> bool:
    """Whether this process speaks for those that the launcher has started beside it."""
    return next((os.environ[place] for place in PLACES if place in os.environ), "0") == "0"
