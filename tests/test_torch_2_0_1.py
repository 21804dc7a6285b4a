"""No source uses what torch 2.0.1, the Poplar SDK's, does not have. Python 3.8's grammar is test_rooms.py's.

torch_2_0_1_names.txt lists every name of torch that the sources use, with the keywords that they give it, each tried
in torch 2.0.1. A name that is used and not listed fails the test, until somebody has looked it up and added it.

What is called on a tensor or a module cannot be told from the source; names that only a later torch has are known.
"""

import ast
from pathlib import Path

from tests.conftest import ROOT

ROOMS = ("models", "backends", "data", "utils")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
LIST = Path(__file__).with_name("torch_2_0_1_names.txt")
MAY_CHECK = "backends/native/"  # how the files begin where newer names may be used behind hasattr()

# By comparison of torch 2.0.1 with 2.13.0: attributes of tensors, modules, optimizers, generators and dtypes that came
# later, but for names that other things have as well (index, compile, nbytes), and keywords that old methods got later.
LATER_METHODS = {
    *("const_data_ptr", "dim_order", "grad_dtype", "hash_tensor", "is_maia", "is_mtia", "is_xla", "module_load"),
    *("mtia", "nonzero_static", "register_post_accumulate_grad_hook", "slice_inverse", "set_submodule", "to_complex"),
    *("register_load_state_dict_pre_hook", "register_state_dict_post_hook", "clone_state", "graphsafe_get_state"),
    *("graphsafe_set_state", "to_real"),
}


LATER_KEYWORDS = {
    ("load_state_dict", "assign"),
    ("modules", "remove_duplicate"),
    ("register_forward_hook", "always_call"),
}
LATER_KEYWORDS |= {("stft", "align_to_window"), ("to_empty", "recurse")}


def torch_aliases(tree):
    """{name in the source: what it stands for} of everything that is imported out of torch, and the imported names."""
    aliases, imported = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "torch":
                    aliases[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    imported.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch" and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                imported.add(f"{node.module}.{alias.name}")
    return aliases, imported


def uses(tree, may_check=False):
    """Every use of torch, "torch.nn.Linear" or with a keyword "torch.nn.Linear bias="; later methods as ".name".

    may_check: names for which the file asks hasattr() are left out.
    """
    aliases, imported = torch_aliases(tree)
    found, checked, inner = set(imported), set(), set()

    def dotted(node):
        if isinstance(node, ast.Attribute):
            before = dotted(node.value)
            return before and f"{before}.{node.attr}"
        return aliases.get(node.id) if isinstance(node, ast.Name) else None

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, method = dotted(node.func), getattr(node.func, "attr", "")
            if getattr(node.func, "id", "") == "hasattr" and dotted(node.args[0]):
                checked.add(f"{dotted(node.args[0])}.{getattr(node.args[1], 'value', '')}")
            for keyword in node.keywords:
                if name and keyword.arg:
                    found.add(f"{name} {keyword.arg}=")
                elif not name and (method, keyword.arg) in LATER_KEYWORDS:
                    found.add(f".{method} {keyword.arg}=")
        name = dotted(node)
        if name and node not in inner:  # of torch.nn.Linear, not torch.nn as well
            found.add(name)
        elif isinstance(node, ast.Attribute) and not name and node.attr in LATER_METHODS:
            found.add(f".{node.attr}")
        if name and isinstance(node, ast.Attribute):
            inner.add(node.value)
    return {use for use in found if not may_check or use.partition(" ")[0] not in checked}


def listed():
    """The list as uses() spells it."""
    names = set()
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, *keywords = line.split()
            names.update([name, *(f"{name} {keyword}" for keyword in keywords)])
    return names


def test_sources_use_names_of_torch_2_0_1():
    known, unknown = listed(), {}
    for path in SOURCES:
        name, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"), str(path))
        unknown[name] = sorted(uses(tree, may_check=name.startswith(MAY_CHECK)) - known)
    unknown = {name: missing for name, missing in unknown.items() if missing}
    assert not unknown, f"look up in torch 2.0.1, then add to {LIST.name} (later methods: do without): {unknown}"
    noticed = {
        "torch.zeros(3, device=d).nonzero_static()": ".nonzero_static",
        "torch.nn.RMSNorm(3)": "torch.nn.RMSNorm",
    }
    noticed["torch.where(a, out=b)"] = "torch.where out="
    for source, use in noticed.items():
        assert use in uses(ast.parse(f"import torch\n{source}")) - known
