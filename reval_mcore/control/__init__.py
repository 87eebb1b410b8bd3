"""How the processes of a run tell each other what to do: signals to stop, small files below RUN/control,
and wake-ups that there is news in these."""

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
from reval_mcore.control.wakeups import TO_COLLECTORS, News, WakeUps, open_wakeups, serve_wakeups

__all__ = [
    "TO_COLLECTORS",
    "Collection",
    "Heart",
    "Heartbeat",
    "Lease",
    "LeaseKeeper",
    "News",
    "StopSignals",
    "TrainerHeart",
    "WakeUps",
    "announce_server",
    "block_id",
    "block_of",
    "die_with_parent",
    "open_wakeups",
    "quota_blocks",
    "read_collection",
    "read_leases",
    "read_servers",
    "serve_wakeups",
    "withdraw_server",
]
