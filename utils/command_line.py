"""The mechanics under args.py: a parser with one-line errors, types with ranges, and configs.yaml beneath the flags.

A flag's value is its default, then what the named entry of the configuration file says, then what the command line
says. An entry's keys are flag names with underscores, and pass through the same checks as flags. Which flags there are
is args.py's business. Imports nothing heavier than yaml.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs.yaml"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, both spellings of every flag, and switches that can be turned off again."""

    def __init__(self, description, epilog=None):
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.source = ""  # where the words being parsed come from, for error()

    def error(self, message):
        message = re.sub(r"(--[\w-]+)/--\w+", r"\1", message)  # one spelling of the flag is enough
        print(f"{self.prog}: error: {self.source}{' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    def heading(self, title):
        """→ add(name, default, help, type=…): one flag a line under this heading."""
        group = self.add_argument_group(title)

        def add(name, default, help, type=str, **more):
            spellings = sorted({f"--{name}", f"--{name.replace('-', '_')}"})
            if type is bool:
                more = {"nargs": "?", "const": True, **more}
                negations = sorted({f"--no-{name}", f"--no_{name.replace('-', '_')}"})
                group.add_argument(*spellings, type=boolean, default=default, help=help, metavar="BOOL", **more)
                dest = name.replace("-", "_")
                group.add_argument(*negations, dest=dest, action="store_false", default=default, help=argparse.SUPPRESS)
            else:
                group.add_argument(*spellings, type=type, default=default, help=help, **more)

        return add

    def flags(self):
        """Names of all flags, with underscores."""
        return {action.dest for action in self._actions} - {"help", "config"}


def boolean(text):
    words = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return words[text.lower()]


def number(kind, low=None, high=None, above=None, below=None):
    """A type for argparse: an int or float within its range."""
    names = {int: "a whole number", float: "a number"}
    limits = [(low, "at least"), (high, "at most"), (above, "above"), (below, "below")]
    wanted = " ".join([names[kind]] + [f"{word} {limit:g}" for limit, word in limits if limit is not None])

    def parse(text):
        try:
            value = kind(text)
            inside = math.isfinite(value)
        except (ValueError, OverflowError):  # the latter: a whole number of hundreds of digits
            value, inside = math.nan, False
        inside = inside and (low is None or value >= low) and (high is None or value <= high)
        inside = inside and (above is None or value > above) and (below is None or value < below)
        if not inside:
            raise argparse.ArgumentTypeError(f"'{text}' is not {wanted}")
        return value

    return parse


def list_of(parse):
    """A type for argparse: values separated by commas or spaces."""

    def parse_list(text):
        return [parse(word) for word in text.replace(",", " ").split()]

    return parse_list


def read_entry(name, parser):
    """The named entry of configs.yaml, its keys checked against the parser's flags; a dict."""
    try:
        entries = yaml.safe_load(CONFIGS.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"{CONFIGS.name}: {error.strerror}")
    except (yaml.YAMLError, ValueError) as error:  # the latter: no UTF-8, or a date such as 2024-13-45
        parser.error(f"{CONFIGS.name} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        parser.error(f"{CONFIGS.name}: wanted are named configurations, each with its settings")
    if name not in entries:
        known = ", ".join(map(str, entries))
        parser.error(f"argument --config: no configuration '{name}' in {CONFIGS.name}; it has {known}")
    unknown = [str(key) for key in entries[name] if key not in parser.flags()]
    if unknown:
        parser.error(f"{CONFIGS.name}, {name}: {', '.join(unknown)}: no such setting of {parser.prog} (see --help)")
    return entries[name]


def as_words(entry, parser):
    """A configuration entry as the words of a command line, so that flags and YAML share one set of checks."""
    words = []
    texts = {action.dest for action in parser._actions if action.type is str}
    for key, value in entry.items():
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, (dict, list)) for part in parts):
            parser.error(f"{key}: {value} is neither a value nor a list of values")
        if key in texts and isinstance(value, (list, bool)):  # YAML reads on and no as booleans
            parser.error(f"{key}: {value} is not text; put it into quotes")
        if isinstance(value, list):
            value = ",".join(str(item) for item in value)
        if value is not None:
            words.append(f"--{key}={value}")
    return words


def parse(parser, argv=None):
    """argv with the configuration that it names → namespace. Errors: one line on stderr, exit status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    namespace = None
    if "--config" in parser.format_usage():
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", nargs="?")
        name = first.parse_known_args(argv)[0].config
        if name is not None:
            entry = read_entry(name, parser)
            parser.source = f"{CONFIGS.name}, {name}: "
            namespace = parser.parse_args(as_words(entry, parser))
            parser.source = ""
    settings = parser.parse_args(argv, namespace)
    if namespace is not None:  # what is checked from here on, flags against each other, may come from either
        parser.source = f"with {CONFIGS.name}, {name}: "
    for key, value in vars(settings).items():
        if isinstance(value, list) and value and isinstance(value[0], list):  # nargs="+" of comma lists: one flat list
            setattr(settings, key, [item for part in value for item in part])
    return settings
