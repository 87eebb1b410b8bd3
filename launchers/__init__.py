"""From a configuration to a running job: on this machine, on Slurm, or by nemo-run.

`slurm`, `local` and `nemo` are commands; each brings `supervisor` to run where the job is, which starts the trainer and
a `rollout_node` on each rollout node, and decides what their ends mean. `cluster` is what a user says of a cluster.
"""
