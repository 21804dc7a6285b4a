"""The machines that run a model: base.py is the contract, native/ serves CPUs and GPUs, ipu/ Graphcore IPUs."""

from backends.native.backend import OutOfMemory, for_inference, for_training, memory_explained

__all__ = ["OutOfMemory", "for_inference", "for_training", "memory_explained"]
