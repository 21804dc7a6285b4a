"""Run a command on the stand-in: python tests/cuda_contract/run.py [--gpu h100|t4] COMMAND.py [flags]."""

import os
import runpy
import sys

words, name = sys.argv[1:], "h100"
if words[0] == "--gpu":
    name, words = words[1], words[2:]
import standin  # noqa: E402

gpu = standin.install(name)
sys.path[0], sys.argv = os.getcwd(), words
try:
    runpy.run_path(words[0], run_name="__main__")
finally:
    print(f"--- {words[0]} on a stand-in for {name}\n{gpu.report()}", file=sys.stderr)
