"""Parse command lines: flags with ranges, one-line errors, a readable --help, and configs.yaml beneath the flags.

A setting is the flag's value, else that of the named entry of configs.yaml, else the default. An entry's keys are flag
names with underscores, and their values pass through the same checks. Imports nothing heavier than yaml.
"""

import argparse
import contextlib
import difflib
import logging
import math
import os
import re
import select
import sys
import textwrap
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Sequence, Set

import yaml

from utils.errors import describe_error, ran_out_of_memory

CONFIGS = Path(__file__).resolve().parent.parent / "configs.yaml"
EXIT_INTERRUPTED = 130
EXIT_CLOSED_OUTPUT = 141  # what a shell reports for SIGPIPE
HELP_COLUMN = 38
HELP_WIDTH = 120
Add = Callable[..., None]  # what Parser.heading returns
_discarded = False


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, flags in two spellings, and switches that can be turned off again."""

    def __init__(self, description: str, usage: str = "[flags]"):
        super().__init__(description=description, usage=f"%(prog)s {usage}", allow_abbrev=False, add_help=False)
        self.add_argument("-h", "--help", action="help", help="show this help; --no-NAME turns a switch off again")
        self.source = ""  # which configuration the values that are being checked come from, for error()

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and exit with status 2."""
        message = re.sub(r"(--[\w-]+)/--\w+", r"\1", message)  # one spelling of a flag is enough
        if message.startswith("unrecognized arguments: "):
            message += self._suggestion(message)
        print(f"{self.prog}: error: {self.source}{' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        with exit_on_error():
            print(message, end="", file=file)

    def heading(self, title: str) -> Callable[..., None]:
        """Start a group of flags; return a function that adds one: add(name, default, help, type=str, **more).

        Keywords in `more` go to add_argument. --no-NAME, or the value false, turns a flag of type bool off.
        """
        group = self.add_argument_group(title)

        def add(name: str, default: Any, help: str, type: Any = str, **more: Any) -> None:
            dest = name.replace("-", "_")
            if type is bool:
                more = {"nargs": "?", "const": True, "metavar": "", **more}
                group.add_argument(*_spellings(name), type=boolean, default=default, help=help, **more)
                off = {"dest": dest, "action": "store_false", "default": default, "help": argparse.SUPPRESS}
                group.add_argument(*_spellings(f"no-{name}"), **off)
            else:
                metavar = None if "choices" in more else getattr(type, "metavar", "NAME")
                more = {"metavar": metavar, **more}
                group.add_argument(*_spellings(name), type=type, default=default, help=help, **more)

        return add

    def _suggestion(self, message: str) -> str:
        """Return the question whether the first unknown flag of a message meant a known one; "" if none is like it."""
        flags = sorted(name.replace("_", "-") for name in self.flags())
        word = next((word[2:] for word in message.replace("=", " ").split() if word.startswith("--")), "")
        word = word.replace("_", "-")
        abbreviated = [flag for flag in flags if word and flag.startswith(word)]
        found = abbreviated or difflib.get_close_matches(word, flags, n=1)
        return f" (did you mean --{' or --'.join(found[:3])}?)" if found else ""

    def flags(self) -> Set[str]:
        return {action.dest for action in self._actions} - {"help", "config"}

    def parse(self, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
        """Parse argv on top of the configuration that --config names; an error is one line and exit status 2."""
        argv = sys.argv[1:] if argv is None else list(argv)
        namespace = name = None
        if "--config" in self._option_string_actions:
            first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            first.add_argument("--config", nargs="?")
            name = first.parse_known_args(argv)[0].config
            if name is not None:
                entry = self.read_entry(name)
                unknown = [str(key) for key in entry if key not in self.flags()]
                if unknown:
                    words = ", ".join(unknown)
                    self.error(f"{CONFIGS.name}, {name}: {words}: no such setting of {self.prog} (see --help)")
                self.source = f"{CONFIGS.name}, {name}: "
                namespace = self.parse_args(self._as_words(entry))
                self.source = ""
        settings = self.parse_args(argv, namespace)
        if name is not None:  # later checks, of flags against each other, may concern either
            self.source = f"with {CONFIGS.name}, {name}: "
        for key, value in vars(settings).items():
            if isinstance(value, list) and any(isinstance(part, list) for part in value):  # comma lists: one flat list
                setattr(settings, key, [item for part in value for item in part])
        return settings

    def flags_given(self, argv: Optional[Sequence[str]] = None) -> Set[str]:
        """Return the names, with underscores, of the flags on the command line itself, not in a configuration."""
        unset = argparse.Namespace(**dict.fromkeys(self.flags()))
        return {name for name, value in vars(self.parse_args(argv, unset)).items() if value is not None}

    def read_entry(self, name: str) -> Dict[str, Any]:
        """Return an entry of configs.yaml as it is written; an error is one line and exit status 2."""
        try:
            entries = yaml.safe_load(CONFIGS.read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"{CONFIGS.name}: {error.strerror}")
        except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2024-13-45
            self.error(f"{CONFIGS.name} is not YAML: {error}")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            self.error(f"{CONFIGS.name}: must hold named configurations, each with its settings")
        if name not in entries:
            known = ", ".join(map(str, entries))
            self.error(f"argument --config: no configuration '{name}' in {CONFIGS.name}; it has {known}")
        return entries[name]

    def _as_words(self, entry: Dict[str, Any]) -> List[str]:
        """Spell a configuration entry as the words of a command line, so that both share one set of checks."""
        words = []
        texts = {action.dest for action in self._actions if action.type in (str, path)}
        for key, value in entry.items():
            parts = value if isinstance(value, list) else [value]
            if any(isinstance(part, (dict, list)) for part in parts):
                self.error(f"{key}: {value} is neither a value nor a list of values")
            if key in texts and isinstance(value, (list, bool)):  # YAML reads on and no as booleans
                self.error(f"{key}: {value} is not text; put it in quotes")
            if value is not None:
                words.append(f"--{key}={','.join(map(str, parts))}")
        return words

    def refuse(self, flag: str, problem: str) -> NoReturn:
        self.error(f"argument --{flag}: {problem}")

    def machine_flags(self) -> None:
        add = self.heading("Machine")
        add("device", "auto", "auto takes CUDA, else an IPU with its SDK enabled, else the CPU", choices=DEVICES)
        add("precision", "auto", "arithmetic of the transformer; auto takes bf16 if it is fast", choices=PRECISIONS)
        add("executable-cache-dir", None, "folder to keep programs compiled for IPUs in; they take minutes", path)

    @staticmethod
    def window_flag(add: Add) -> None:
        add("window", None, "codes of an image that a pass computes; default: what is fastest", COUNT, metavar="N")

    @staticmethod
    def vqgan_file_flags(add: Add) -> None:
        add("vqgan-model-path", None, "VQGAN weights (.ckpt of taming); none: download the official ImageNet one", path)
        add("vqgan-config-path", None, "its .yaml; none: the file of the same stem next to the .ckpt", path)

    def sampling_flags(self, title: str) -> None:
        """Add the flags of sampling; train.py stores them in checkpoints, where generate.py finds its defaults."""
        add = self.heading(title)
        add("top-k", None, "share of the vocabulary to exclude (0 to 1), or number of codes to keep", top_k)
        add("top-p", None, "keep the likeliest codes up to this probability", number(float, above=0, high=1))
        add("temperature", None, "below 1: safer images, above 1: wilder ones", POSITIVE)
        text = "guidance towards the text, 1 for none; needs --caption-dropout in training"
        add("cond-scale", None, text, NOT_NEGATIVE)

    def check_vqgan_files(self, settings: argparse.Namespace) -> None:
        """Refuse flags that name no VQGAN, or two."""
        if settings.vqgan_config_path and not settings.vqgan_model_path:
            self.refuse("vqgan-config-path", "needs --vqgan-model-path, the weights that it describes")
        if getattr(settings, "vae_path", None) and settings.vqgan_model_path:
            self.refuse("vae-path", "names a VQGAN, and so does --vqgan-model-path; give one of them")

    def format_help(self) -> str:
        """Return usage, description, and a line for each flag in one spelling, with its default in brackets."""
        lines = [self.format_usage().strip(), *textwrap.wrap(self.description or "", HELP_WIDTH)]
        for group in self._action_groups:
            actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
            named = group is not self._positionals and group is not self._optionals
            lines += [f"{group.title}:"] * bool(actions and named)
            for action in actions:
                name = "-h, --help" if action.dest == "help" else " ".join(action.option_strings[:1])
                metavar = "…" if action.choices else action.metavar or ""
                left = f"  {name} {metavar}".replace("   ", "  ").rstrip().ljust(HELP_COLUMN - 1)
                right = textwrap.wrap(_help_of(action), HELP_WIDTH - HELP_COLUMN, break_on_hyphens=False)
                if len(left) >= HELP_COLUMN:
                    lines.append(left)
                    left = " " * (HELP_COLUMN - 1)
                lines += [f"{start} {line}" for start, line in zip([left] + [" " * (HELP_COLUMN - 1)] * 9, right)]
        return "\n".join(lines) + "\n"


def _spellings(name: str) -> List[str]:
    return sorted({f"--{name}", f"--{name.replace('-', '_')}"})


def _help_of(action: argparse.Action) -> str:
    text = action.help or ""
    if action.choices:
        text += f" (one of {', '.join(map(str, action.choices))})"
    default = action.default
    if isinstance(default, (list, tuple)):
        default = ",".join(map(str, default))
    shown = default not in ("", argparse.SUPPRESS) and default is not None and default is not False
    return f"{text} [{default}]" if shown else text


def boolean(text: str) -> bool:
    """Parse true or false, yes or no, their first letters, on or off, 1 or 0."""
    word = text.lower()
    if word in ("true", "t", "yes", "y", "on", "1"):
        return True
    if word in ("false", "f", "no", "n", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"must be true or false, not '{text}'")


def number(
    kind: Callable[[str], Any],
    low: Optional[float] = None,
    high: Optional[float] = None,
    above: Optional[float] = None,
    below: Optional[float] = None,
) -> Callable[[str], Any]:
    """Return a function that parses an int or float (`kind`) within a range; `above` and `below` exclude the limit."""
    limits = [(low, "at least"), (high, "at most"), (above, "above"), (below, "below")]
    phrases = [f"{word} {limit:g}" for limit, word in limits if limit is not None]
    noun = "a whole number" if kind is int else "a number"
    expected = f"{noun} of {' and '.join(phrases)}" if phrases else noun
    expected = expected.replace("of above", "above").replace("of below", "below")

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            inside = math.isfinite(value)
        except (ValueError, OverflowError):  # OverflowError: a whole number of hundreds of digits
            value, inside = math.nan, False
        inside = inside and (low is None or value >= low) and (high is None or value <= high)
        inside = inside and (above is None or value > above) and (below is None or value < below)
        if not inside:
            raise argparse.ArgumentTypeError(f"must be {expected}, not '{text}'")
        return value

    parse.metavar = "N" if kind is int else "X"  # type: ignore[attr-defined]
    return parse


def list_of(parse: Callable[[str], Any]) -> Callable[[str], List[Any]]:
    """Return a function that parses values separated by commas or spaces."""

    def parse_list(text: str) -> List[Any]:
        return [parse(word) for word in text.replace(",", " ").split()]

    parse_list.metavar = "{0},{0},…".format(getattr(parse, "metavar", "X"))  # type: ignore[attr-defined]
    return parse_list


def path(text: str) -> str:
    """Accept any text; --help shows PATH."""
    return text


path.metavar = "PATH"  # type: ignore[attr-defined]


# Flags that several commands share, and the types of their values.

DEVICES = ("auto", "cpu", "cuda", "ipu")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COUNT = number(int, low=1)
NATURAL = number(int, low=0)
SEED = number(int, low=0, high=2**63 - 1)
POSITIVE = number(float, above=0)
NOT_NEGATIVE = number(float, low=0)
SHARE = number(float, low=0, high=1)


def top_k(text: str) -> float:
    """Parse a share from 0 to 1, or a whole number of codes above 1."""
    value = NOT_NEGATIVE(text)
    if value > 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1 or a whole number of codes, not '{text}'")
    return value


top_k.metavar = "X"  # type: ignore[attr-defined]


def discard_output() -> None:
    global _discarded
    _discarded = True
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file
        os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _is_output_closed() -> bool:
    """Return whether nobody reads stdout any more; True if this cannot be found out."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll, or a stdout that is no file
        return True


@contextlib.contextmanager
def exit_on_error(requirements: str = "requirements.txt") -> Iterator[None]:
    """End the program with one line if this block raises an error that its user can mend.

    The status is 2 after a ValueError, an OSError or a missing package, 130 after Ctrl-C, and 141, without a line, if
    nobody reads stdout any more, as after `| head`.

    Args:
        requirements: the file that lists what may be missing.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        line, status = "stopped", EXIT_INTERRUPTED
    except BrokenPipeError:
        if not (_discarded or _is_output_closed()):  # another pipe broke
            raise
        discard_output()
        raise SystemExit(EXIT_CLOSED_OUTPUT) from None
    except (ModuleNotFoundError, ValueError, OSError, RuntimeError, MemoryError) as error:
        is_memory = ran_out_of_memory(error)
        if isinstance(error, RuntimeError) and not is_memory:
            raise
        logging.getLogger("minidalle").debug("raised here:", exc_info=True)
        problem = "out of memory: model or data are too large for this device" if is_memory else describe_error(error)
        if isinstance(error, ModuleNotFoundError):
            problem = f"{error.name} is missing: pip install -r {requirements}"
        line, status = f"{sys.argv[0].rpartition('/')[2]}: error: {problem}", 2
    else:
        return
    print(line, file=sys.stderr)
    raise SystemExit(status)
