"""README.md and docs/: links lead somewhere, commands exist, and the short ones run."""

import re
import shlex

import pytest

import generate
from app import app_parser
from tests import test_args
from tests.builders import ROOT
from utils import checkpoint_info

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {**test_args.PARSERS, "app.py": app_parser}
# Commands that the tests do not run as they stand, and why.
ELSEWHERE = {
    "they are how tests and checks start": ("bash run_tests.sh", "python -m pytest", "ruff", "mypy"),
    "it trains for minutes; run by hand before every release": ("bash run_train.sh",),
    "they need a network": ("pre-commit", "git clone", "pip install", "python3 -m venv"),
    "they change the shell only": ("cd ", ". .venv/bin/activate"),
    "they need the Poplar SDK": ("echo $POPLAR_SDK_ENABLED", ". <SDK>", "poprun"),
    "tests of their own run them on small things": (
        *("bash utils/download_coco_dataset.sh", "python process_captions.py", "python3 -m examples_utils", "torchrun"),
        *("python -m benchmarks", "python -m data.check FOLDER", "curl"),
    ),
}


def anchors_of(page):
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_of(page):
    """Return every line of a page's bash blocks, comments removed and continued lines joined."""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            commands += [part.strip() for part in re.sub(r"\s+#.*$", "", line).split(" && ") if part.strip()]
    return commands


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        goal = page if not path else (page.parent / path).resolve()
        if not goal.exists() or (anchor and anchor not in anchors_of(goal)):
            broken.append(target)
    assert not broken and (page.name != "README.md" or len(page.read_text(encoding="utf-8").splitlines()) <= 150)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    """A command is known to be run elsewhere, or its flags pass the parser of its program."""
    if command.startswith(sum(ELSEWHERE.values(), ())):
        return
    words = shlex.split(command)
    assert words[0] == "python", f"the tests do not know '{command}'"
    if words[1] == "-m":
        assert (ROOT / (words[2].replace(".", "/") + ".py")).exists()
        return
    options = {option for action in PARSERS[words[1]]()._actions for option in action.option_strings}
    flags = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
    assert set(flags) <= options


@pytest.mark.parametrize("line", [one for one in COMMANDS if re.search("generate.py --text|checkpoint_info demo", one)])
def test_short_commands_run(line, command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if "generate.py" in words:
        more = ["--outputs_dir", tmp_path] + ([] if "--num_images" in words else ["--num_images", "2"])
        command(generate.main, *words[2:], *more).ok()
        assert list(tmp_path.rglob("grid.png"))
    else:
        command(checkpoint_info.main, *words[3:]).ok()


def test_python_of_the_documents_runs(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    monkeypatch.chdir(ROOT)
    for block in blocks:
        script = block.replace("images[0].save(", "images[0].copy(); str(").replace("circle.png", "x")
        exec(script, {})
