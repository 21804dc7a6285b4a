"""CPUs and CUDA GPUs: how they train, sample, read data and run a VQGAN."""
