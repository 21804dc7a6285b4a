"""Measures training, drawing, the VQGAN and loading, beside their peers and the machine's limits, all in one run.

    python -m benchmarks                                minutes on two cores
    python -m benchmarks --peer                         with dalle-pytorch, which takes minutes for a picture
    python -m benchmarks --only 'draw-*' encode         some rows; --list names them all
    python -m benchmarks --quick --peer                 small networks, to see that everything runs

Prints a table and writes results.json and results.png. Figures are medians, with the least and the greatest behind
them; every row is measured in a process of its own, its peer in another one right after it.
"""

import datetime
import fnmatch
import json
import sys
from pathlib import Path

from tqdm import tqdm

import log
from backends.native.backend import pick_device, pick_precision
from benchmarks import peer, plot
from benchmarks.limits import machine
from benchmarks.plot import figure
from benchmarks.rows import ROWS, measured
from utils.command_line import Parser
from utils.files import atomic_write, check_writable

HEAD = f"{'':34}{'here':>9} {'':10} {'(min - max)':>17} {'of limit':>8} {'MB':>7} {'peer':>9} {'ratio':>7} {'MB':>7}"


def main(argv=None):
    flags = parse(argv)
    if flags.list:
        print("\n".join(f"{name:12} {row.what}" for name, row in ROWS.items()))
        return
    with log.exit_on_interrupt(), log.exit_on_bad_input():
        check_writable(flags.output_dir, "--output-dir")
        device = pick_device("auto")
        found = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(device),
            "precision": pick_precision("auto", device),
            "quick": flags.quick,
            "rows": [],
        }
        print(f"{title(found)}\n{HEAD}", flush=True)
        with tqdm(total=len(flags.rows), bar_format="{n}/{total} {desc}{elapsed}") as bar:
            for name in flags.rows:
                found["rows"].append(measured(name, flags.quick, flags.peer, bar.set_description))
                bar.write(line(found["rows"][-1]), file=sys.stdout)
                sys.stdout.flush()
                save(found, Path(flags.output_dir))  # a run that is ended keeps what it has
                bar.update()
    print(f"wrote {Path(flags.output_dir) / 'results.json'} and results.png")


def parse(argv):
    parser = Parser(__doc__.splitlines()[0])
    add = parser.heading("what is measured")
    add("only", None, "rows to measure, by name or pattern such as draw-*; none: all", nargs="+", metavar="PATTERN")
    add("peer", False, "measure dalle-pytorch 1.6.6, its loader and taming's VQGAN as well", type=bool)
    add("quick", False, "small networks and few samples", type=bool)
    add("list", False, "name the rows and measure nothing", type=bool)
    add("output-dir", "output/benchmarks", "folder for results.json and results.png")
    flags = parser.parse_args(argv)
    patterns = flags.only or ["*"]
    for pattern in patterns:
        if not fnmatch.filter(ROWS, pattern):
            parser.error(f"argument --only: no row '{pattern}'; there are {', '.join(ROWS)}")
    flags.rows = [name for name in ROWS if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if flags.peer and peer.load() is None:
        parser.error("argument --peer: dalle-pytorch is not installed; run_tests.sh installs it")
    return flags


def title(found):
    where = found["machine"]
    name = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
    size = "small networks" if found["quick"] else "L16"
    return f"{size} in {found['precision']}, {name}, torch {where['torch']}, {found['date'][:10]}"


def line(row):
    ours, theirs = row["ours"], row["peer"]
    spread = f"({figure(ours['min'])} - {figure(ours['max'])})"
    of_limit = f"{100 * row['of_limit']:.0f} %" if row["of_limit"] else ""
    text = f"{row['what']:34}{figure(ours['median']):>9} {row['unit']:10} {spread:>17} {of_limit:>8}"
    text += f" {ours['peak_memory_mb']:7.0f}"
    if theirs:
        text += f" {figure(theirs['median']):>9} {figure(row['ratio']):>7} {theirs['peak_memory_mb']:7.0f}"
        text += f"  {row['peer_name']}"
    return text


def save(found, folder):
    """results.json and results.png, each written beside its name and renamed."""
    path = folder / "results.json"
    with atomic_write(path, text=True) as file:
        file.write(json.dumps(found, indent=1) + "\n")
    with atomic_write(folder / "results.png") as file:
        plot.draw(found["rows"], title(found)).save(file, "PNG")


if __name__ == "__main__":
    main()
