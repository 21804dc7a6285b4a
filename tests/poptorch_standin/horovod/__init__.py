"""A stand-in for Horovod as PopRun uses it; see horovod.torch."""
