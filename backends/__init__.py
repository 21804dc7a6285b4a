"""The machines that run a model: base.py is the contract, native/ serves CPUs and GPUs, ipu/ Graphcore IPUs."""

from backends.native.backend import OutOfMemory, explain_out_of_memory, for_inference, for_training

__all__ = ["OutOfMemory", "for_inference", "for_training", "explain_out_of_memory"]
