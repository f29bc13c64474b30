"""An analysis by several processes: each has a part of the data, and all run the same program.

Rank 0 alone reads and writes what is stored and prints; see :class:`hessdiag.distributed.group.
Group` for what they say to each other.
"""

from hessdiag.distributed.group import Alone, Ended, Group

__all__ = ["Alone", "Ended", "Group"]
