"""The commands work if `fcntl` and `resource` cannot be imported, as on Windows."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BLOCKED = "import sys\nfor name in ('fcntl', 'resource'):\n    sys.modules[name] = None\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate.py", "--text", "a small red circle", "--num_images", "1", "--outputs_dir", "{folder}"],
        ["app.py", "--help"],
        ["train.py", "--config", "unit_test", "--generated-data", "--max-steps", "1", "--device", "cpu"]
        + ["--checkpoint-output-dir", "{folder}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_needs_no_posix_only_module(arguments, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)  # in the processes that it starts, too
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, *(argument.format(folder=tmp_path / "out") for argument in arguments)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
