"""Run the program's tests with the stand-in for every device that they name, the CPU included.

PYTHONPATH=tests/cuda_contract python -m pytest -p on_standin tests/backends/native tests/models
"""

import standin

gpu = standin.install("h100")


def pytest_sessionstart(session):
    import torch

    from backends.native import backend

    backend.pick_device = lambda name: torch.device("cuda")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(gpu.report())
