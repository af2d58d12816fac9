"""Several processes: torchrun, weights sharded by FSDP2, a pool of workers."""
