"""The commands run on systems without POSIX-only modules, such as Windows."""

import pytest

from tests.builders import ROOT, python

WITHOUT_POSIX = """
import runpy, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None  # importing it now raises ImportError
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    "command",
    [
        "generate.py --text red --num_images 1 --device cpu --outputs_dir OUT",
        "train.py --config unit_test --generated-data --max-steps 1 --device cpu --checkpoint-output-dir OUT",
        "app.py --help",
    ],
)
def test_a_command_runs_without_posix_modules(command, tmp_path):
    script, *flags = command.replace("OUT", str(tmp_path / "out")).split()
    ended = python("-c", WITHOUT_POSIX, ROOT / script, *flags)
    assert ended.returncode == 0, ended.stderr
