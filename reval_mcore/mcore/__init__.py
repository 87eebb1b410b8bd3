"""Everything that touches megatron-core: model, packing, loss head, optimizer, reference, checkpoints, the learner.

Importing this package makes megatron-core usable on the machine at hand, before any of its modules is loaded.
"""

from reval_mcore.mcore import cpu_shim

cpu_shim.install()
