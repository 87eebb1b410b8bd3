"""How the processes of a run tell each other what to do: signals to stop, and small files below RUN/control."""

from reval_mcore.control.leases import (
    Collection,
    Heart,
    Heartbeat,
    Lease,
    LeaseKeeper,
    block_id,
    block_of,
    quota_blocks,
    read_collection,
    read_leases,
)
from reval_mcore.control.parent import die_with_parent
from reval_mcore.control.servers import announce_server, read_servers, withdraw_server
from reval_mcore.control.stop import StopSignals
from reval_mcore.control.trainer_heart import TrainerHeart

__all__ = [
    "Collection",
    "Heart",
    "Heartbeat",
    "Lease",
    "LeaseKeeper",
    "StopSignals",
    "TrainerHeart",
    "announce_server",
    "block_id",
    "block_of",
    "die_with_parent",
    "quota_blocks",
    "read_collection",
    "read_leases",
    "read_servers",
    "withdraw_server",
]
