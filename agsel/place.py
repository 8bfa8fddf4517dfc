"""Which of the processes of its host this one is, as its launcher says. Needs nothing that could be missing."""

import os

PLACE = "AGSEL_PLACE_ON_HOST"
"""Of a process whose LOCAL_RANK says which device it uses instead."""
PLACES = (
    PLACE,
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
    "PMIX_RANK",
)
"""Variables that say it: agsel's own, the common one, those of Open MPI, MVAPICH, MPICH and Slurm; else the rank."""


def is_first_of_host() -> bool:
    """Whether this process speaks for those that the launcher has started beside it."""
    return next((os.environ[place] for place in PLACES if place in os.environ), "0") == "0"
