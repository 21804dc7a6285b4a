"""A pytest plugin: the project's own tests with the stand-in in place of every device that they name, the CPU included.

PYTHONPATH=tests/cuda_contract python -m pytest -n0 -p on_standin tests/…        GPU=h100, a100, 4090 or t4
"""

import os

import standin

gpu = standin.install(os.environ.get("GPU", "h100"))


def pytest_sessionstart(session):
    import torch

    from backends.native import backend

    backend.pick_device = lambda name: torch.device("cuda")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("on a stand-in for CUDA: " + gpu.report().replace("\n", "\n    "))
