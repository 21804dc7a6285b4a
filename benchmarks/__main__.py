"""Measure training, sampling, the VQGAN and loading, next to their peers and the machine's limits, in one run.

    python -m benchmarks                                minutes on two cores
    python -m benchmarks --peer                         with dalle-pytorch, which takes minutes per image
    python -m benchmarks --only 'generate-*' encode         some rows; --list names them all
    python -m benchmarks --quick --peer                 small networks, to see that everything runs

Prints a table and writes results.json. The figures are medians, followed by the least and the greatest
value. A peer is measured right after the row that it is compared with.
"""

import argparse
import datetime
import fnmatch
import json
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from tqdm import tqdm

from backends.native.backend import pick_device, pick_precision
from benchmarks import peer
from benchmarks.limits import describe_machine
from benchmarks.rows import ROWS, measure_row
from utils.command_line import Parser, exit_on_error
from utils.files import atomic_write, check_writable

HEAD = f"{'':34}{'here':>9} {'':10} {'(min - max)':>17} {'passes':>6} {'of limit':>8} {'MB':>7}"
HEAD += f" {'peer':>9} {'ratio':>7} {'MB':>7}"


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    flags = parse_flags(argv)
    if flags.list:
        print("\n".join(f"{name:12} {row.what}" for name, row in ROWS.items()))
        return
    with exit_on_error():
        check_writable(flags.output_dir, "--output-dir")
        folder, device = Path(flags.output_dir), pick_device("auto")
        results: Dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": describe_machine(device),
            "precision": pick_precision("auto", device),
            "quick": flags.quick,
            "rows": [],
        }
        title = make_title(results)
        print(f"{title}\n{HEAD}", flush=True)
        with tqdm(total=len(flags.rows), bar_format="{n}/{total} {desc}{elapsed}") as bar:
            for name in flags.rows:
                results["rows"].append(measure_row(name, flags.quick, flags.peer, bar.set_description))
                bar.write(format_row(results["rows"][-1]), file=sys.stdout)
                sys.stdout.flush()
                with atomic_write(folder / "results.json", text=True) as file:  # after each row: a run may be ended
                    file.write(json.dumps(results, indent=1) + "\n")
                bar.update()
    print(f"wrote {folder / 'results.json'}")


def parse_flags(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line; `rows` becomes the names of the rows to measure."""
    parser = Parser((__doc__ or "").splitlines()[0])
    parser.prog = "python -m benchmarks"
    add = parser.heading("what is measured")
    add("only", None, "rows to measure, by name or pattern such as generate-*; none: all", nargs="+", metavar="PATTERN")
    add("peer", False, "measure dalle-pytorch 1.6.6, a plain loader and taming's VQGAN as well", type=bool)
    add("quick", False, "small networks and few samples", type=bool)
    add("list", False, "name the rows and measure nothing", type=bool)
    add("output-dir", "output/benchmarks", "folder for results.json")
    flags = parser.parse_args(argv)
    patterns = flags.only or ["*"]
    for pattern in patterns:
        if not fnmatch.filter(ROWS, pattern):
            parser.error(f"argument --only: no row '{pattern}'; there are {', '.join(ROWS)}")
    flags.rows = [name for name in ROWS if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if flags.peer and peer.load() is None:
        parser.error("argument --peer: dalle-pytorch is not installed; run_tests.sh installs it")
    return flags


def make_title(results: Dict[str, Any]) -> str:
    """Return one line about the network, the machine and the day."""
    machine = results["machine"]
    name = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    size = "small networks" if results["quick"] else "L16"
    return f"{size} in {results['precision']}, {name}, torch {machine['torch']}, {results['date'][:10]}"


def format_number(value: float) -> str:
    """Format a number with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def format_row(row: Dict[str, Any]) -> str:
    """Return a line of the table."""
    ours, theirs = row["ours"], row["peer"]
    spread = f"({format_number(ours['min'])} - {format_number(ours['max'])})"
    of_limit = f"{100 * row['of_limit']:.0f} %" if row["of_limit"] else ""
    passes = f"{row['passes']:.0f}" if row["passes"] else ""
    text = f"{row['what']:34}{format_number(ours['median']):>9} {row['unit']:10} {spread:>17} {passes:>6} {of_limit:>8}"
    text += f" {ours['peak_memory_mb']:7.0f}"
    if theirs:
        text += f" {format_number(theirs['median']):>9} {format_number(row['ratio']):>7}"
        text += f" {theirs['peak_memory_mb']:7.0f}  {row['peer_name']}"
    return text


if __name__ == "__main__":
    main()
