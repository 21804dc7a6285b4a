"""Arrays of files on disk: computed once, shared by processes, whole whatever stops them, computed again if damaged."""

import multiprocessing
import os
import time

import numpy as np
import pytest

from data.codes import CodeCache
from tests.builders import until

FILES = [(f"{number:02d}", number, 1000 + number) for number in range(20)]


def opened(folder, by="this"):
    return CodeCache(folder / "cache", "kind", folder, np.uint16, 2, {"version": 1, "by": by})


def values_of(file):
    return [file[1], file[2]]


def computing(files, seen):
    """compute() for fill(): a file's values from its state; notes in `seen` what it was asked for."""

    def compute(batches):
        for batch in batches:
            seen.extend(files[i] for i in batch)
            yield batch, np.array([values_of(files[i]) for i in batch], np.uint16)

    return compute


def filled(folder, files=FILES, **options):
    """(what fill() asked for, the values of each file)."""
    seen, cache = [], opened(folder, **options)
    cache.fill(files, computing(files, seen), 3)
    values, rows = cache.load(files)
    return seen, values[rows].tolist()


def expected(files=FILES):
    return [values_of(file) for file in files]


def test_computed_once_in_any_order_and_state(tmp_path):
    assert filled(tmp_path) == (FILES, expected())  # also in the files' order
    assert filled(tmp_path) == ([], expected())
    assert filled(tmp_path, FILES[7:2:-1]) == ([], expected(FILES[7:2:-1]))
    changed = [*FILES[:3], ("03", 7, 1003), *FILES[4:9], ("09", 9, 5), ("new", 2, 2), *FILES[10:]]
    assert filled(tmp_path, changed) == ([("03", 7, 1003), ("09", 9, 5), ("new", 2, 2)], expected(changed))
    cache = opened(tmp_path)
    assert FILES[3] not in cache and FILES[9] not in cache  # the states before
    assert cache.load(changed)[0].shape == (21, 2)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".lock", ".rows"]
    assert next((tmp_path / "cache").glob("*.rows")).stat().st_size == 21 * (4 + 2 * 2)  # without the states before
    assert filled(tmp_path, changed[5:8])[0] == []


@pytest.mark.parametrize("damage", ["cut rows", "long rows", "no rows", "cut index", "no index", "other"])
def test_damage_is_computed_again(tmp_path, damage, logged):
    filled(tmp_path)
    index, rows = (next((tmp_path / "cache").glob(f"*.{suffix}")) for suffix in ("json", "rows"))
    path = index if "index" in damage or damage == "other" else rows
    content = path.read_bytes()
    if damage.startswith("no"):
        path.unlink()
    else:
        damaged = {"cut": content[:-5], "long": content + b"abc", "other": b'["no", "index"]'}
        path.write_bytes(damaged[damage.split()[0]])
    seen, values = filled(tmp_path)
    # After a lost index, files get the same rows again, in which their values are found.
    assert values == expected() and len(seen) == {"cut rows": 1, "no rows": 20}.get(damage, 0)
    assert ("damaged" in logged.text) == (path == index and damage != "no index")
    assert filled(tmp_path) == ([], expected())


def test_every_flipped_bit_is_noticed(tmp_path):
    filled(tmp_path)
    rows = next((tmp_path / "cache").glob("*.rows"))
    content = rows.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        rows.write_bytes(damaged)
        assert [file in opened(tmp_path) for file in FILES].count(False) == 1
    names = next((tmp_path / "cache").glob("*.json"))
    names.write_text(names.read_text().replace('"03"', '"x"').replace('"05"', "[5]"))
    assert not any(file in opened(tmp_path) for file in FILES) and filled(tmp_path)[1] == expected()


def work(folder, log, seconds):
    """Fill the cache in another process, one file at a time; log what was computed."""

    def compute(batches):
        for batch in batches:
            time.sleep(seconds)
            yield batch, np.array([values_of(FILES[i]) for i in batch], np.uint16)
            with open(log, "a") as file:
                file.write("".join(f"{FILES[i][0]}\n" for i in batch))

    opened(folder).fill(FILES, compute, 1)


def test_what_a_dead_process_was_computing_another_computes(tmp_path):
    def start(name, seconds):
        process = multiprocessing.get_context("spawn").Process(target=work, args=(tmp_path, tmp_path / name, seconds))
        process.start()
        return process

    def lines(name):
        return (tmp_path / name).read_text().splitlines() if (tmp_path / name).exists() else []

    first = start("first.log", 0.7)
    until(lambda: lines("first.log"))
    second = start("second.log", 0.01)
    until(lambda: len(lines("second.log")) >= 10)
    first.kill()
    second.join(60)
    assert second.exitcode == 0 and first.exitcode != 0
    assert sorted(lines("first.log") + lines("second.log")) == [file[0] for file in FILES]  # each once
    with open(next((tmp_path / "cache").glob("*.rows")), "ab") as rows:
        rows.write(os.urandom(5))  # half a record
    assert filled(tmp_path) == ([], expected())
