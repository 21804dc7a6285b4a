"""Arrays about files on disk: found again, shared by processes, whole whatever stops them, made again if damaged."""

import errno
import json
import multiprocessing
import pickle
import time

import numpy as np
import pytest

from data import array_cache as cache_module
from data.array_cache import ArrayCache, pickled_by_name, unpickled

FILES = [(f"{number:02d}", number, 1000 + number) for number in range(20)]


def opened(folder, ragged=False, by="this"):
    return ArrayCache(folder / "cache", "kind", folder, np.uint16, {"version": 1, "by": by, "ragged": ragged})


def values_of(file, ragged=False):
    return [file[1]] * (file[1] % 4) if ragged else [[file[1], file[2]]]


def maker(files, seen, ragged=False):
    """make() for fill(): a file's values from its state; notes in `seen` what it was asked for."""

    def make(batches):
        for batch in batches:
            seen.extend(files[i] for i in batch)
            values = [value for i in batch for value in values_of(files[i], ragged)]
            yield batch, np.array(values, np.uint16), [files[i][1] % 4 for i in batch] if ragged else None

    return make


def filled(folder, files=FILES, ragged=False, **options):
    """→ (what fill() asked for, the values of each file)."""
    seen, arrays = [], opened(folder, ragged)
    arrays.fill(files, maker(files, seen, ragged), batch_size=3, doing="test", unit="file", **options)
    values, starts, stops = arrays.load(files)
    return seen, [values[start:stop].tolist() for start, stop in zip(starts, stops)]


def expected(files=FILES, ragged=False):
    return [values_of(file, ragged) for file in files]


def suffixes(folder):
    return sorted(path.suffix for path in (folder / "cache").iterdir())


@pytest.mark.parametrize("ragged", [False, True])
def test_made_once_in_any_order_and_state(tmp_path, ragged):
    assert filled(tmp_path, ragged=ragged) == (FILES, expected(ragged=ragged))
    assert filled(tmp_path, ragged=ragged) == ([], expected(ragged=ragged))
    assert filled(tmp_path, FILES[7:2:-1], ragged) == ([], expected(FILES[7:2:-1], ragged))
    changed = [*FILES[:3], ("03", 7, 1003), *FILES[4:9], ("09", 9, 5), ("new", 2, 2), *FILES[10:]]
    assert filled(tmp_path, changed, ragged, flush_seconds=0) == (
        [("03", 7, 1003), ("09", 9, 5), ("new", 2, 2)],
        expected(changed, ragged),
    )
    assert suffixes(tmp_path) == [".json", ".npy"]
    values, starts, stops = opened(tmp_path, ragged).load(changed)
    assert isinstance(values, np.memmap) and values.dtype == np.uint16 and len(values) == stops[-1]  # old states left
    assert starts[0] == 0 and np.array_equal(starts[1:], stops[:-1])
    assert filled(tmp_path, changed[5:8], ragged)[0] == []


def test_what_made_them_is_believed_not_the_name(tmp_path):
    filled(tmp_path)
    assert FILES[0] in opened(tmp_path) and FILES[0] not in opened(tmp_path, by="another")
    arrays = opened(tmp_path, by="another")
    arrays.fill(FILES, maker(FILES, []), batch_size=9, doing="test", unit="file")
    arrays.load(FILES)
    assert filled(tmp_path)[0] == [] and suffixes(tmp_path) == [".json", ".json", ".npy", ".npy"]


def test_what_is_left_out_is_asked_for_once(tmp_path):
    arrays, asked = opened(tmp_path), []

    def make(batches):
        for batch in batches:
            asked.extend(batch)
            odd = [i for i in batch if i % 2]
            if odd:
                yield odd, np.array([values_of(FILES[i])[0] for i in odd], np.uint16), None

    arrays.fill(FILES, make, batch_size=1, doing="test", unit="file")
    assert asked == list(range(20)) and [file in arrays for file in FILES] == [False, True] * 10
    with pytest.raises(KeyError):
        arrays.load(FILES)


@pytest.mark.parametrize("damage", ["cut array", "flipped byte", "empty array", "no array", "cut index", "other"])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_damaged_part_is_made_again_and_removed(tmp_path, damage, ragged):
    filled(tmp_path, ragged=ragged)
    array, index = (next((tmp_path / "cache").glob(f"*.{suffix}")) for suffix in ("npy", "json"))
    if damage == "cut array":
        array.write_bytes(array.read_bytes()[:-10])
    elif damage == "flipped byte":
        data = bytearray(array.read_bytes())
        data[-1] ^= 1
        array.write_bytes(bytes(data))
    elif damage == "empty array":
        array.write_bytes(b"")
    elif damage == "no array":
        array.unlink()
    elif damage == "cut index":
        index.write_bytes(index.read_bytes()[:-5])
    else:
        index.write_text(json.dumps(["not", "an", "index"]))
    assert filled(tmp_path, ragged=ragged) == (FILES, expected(ragged=ragged))
    assert suffixes(tmp_path) == [".json", ".npy"] and not index.exists()


def test_any_damage_to_an_index_is_noticed(tmp_path):
    filled(tmp_path, ragged=True)
    index = next((tmp_path / "cache").glob("*.json"))
    content = json.loads(index.read_text())
    for key, value in content.items():
        changed = value + value[:1] if isinstance(value, (list, str)) else value + 1
        index.write_text(json.dumps({**content, key: changed}))
        assert FILES[0] not in opened(tmp_path, ragged=True), key
    index.write_text(json.dumps(content))
    assert FILES[0] in opened(tmp_path, ragged=True)


def test_a_failed_write_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        filled(tmp_path)
    assert suffixes(tmp_path) == []


def test_a_folder_that_can_only_be_read(tmp_path, monkeypatch):
    filled(tmp_path)
    monkeypatch.setattr(cache_module, "_open_lock", None)  # any writing begins with it
    assert filled(tmp_path) == ([], expected())


def test_without_locks_there_is_double_work_at_worst(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache_module.fcntl, "lockf", without)
    assert filled(tmp_path, flush_seconds=0) == (FILES, expected())
    assert filled(tmp_path)[0] == []


def test_a_process_it_is_sent_to_maps_it_too(tmp_path):
    filled(tmp_path)
    values, _, _ = opened(tmp_path).load(FILES)
    for array in (values, values[:5]):
        assert len(pickle.dumps(pickled_by_name(array))) < 400
        again = unpickled(pickled_by_name(array))
        assert isinstance(again, np.memmap) and np.array_equal(again, array)
    assert isinstance(pickled_by_name(values[5:]), np.ndarray)  # which a name and a number of rows do not tell
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    assert np.array_equal(unpickled(pickled_by_name(values)), values) and unpickled(pickled_by_name(None)) is None


# --- several processes ------------------------------------------------------------------------------------------------


def work(folder, log, seconds, at_end):
    """A process that makes what is missing, a file at a time, and writes down what it made."""

    def make(batches):
        for batch in batches:
            for i in batch:
                time.sleep(seconds)
                with open(log, "a") as file:
                    file.write(FILES[i][0] + "\n")
            yield batch, np.array([values_of(FILES[i])[0] for i in batch], np.uint16), None

    arrays = opened(folder)
    arrays.fill(FILES, make, batch_size=2, doing="test", unit="file", flush_seconds=60 if at_end else 0)
    values, starts, stops = arrays.load(FILES)
    assert [values[start:stop].tolist() for start, stop in zip(starts, stops)] == expected()


def started(folder, log, seconds=0.05, at_end=True):
    process = multiprocessing.get_context("spawn").Process(target=work, args=(folder, log, seconds, at_end))
    process.start()
    return process


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("at_end", [True, False], ids=["written at the end", "written at once"])
def test_processes_share_the_work(tmp_path, at_end):
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    processes = [started(tmp_path, log, at_end=at_end) for log in logs]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    made = [lines(log) for log in logs]
    assert sorted(name for names in made for name in names) == [file[0] for file in FILES]  # each of them once
    assert sum(map(bool, made)) >= 2, made
    assert suffixes(tmp_path) == [".json", ".npy"]
    assert filled(tmp_path) == ([], expected())


def test_what_a_dead_process_had_claimed_another_makes(tmp_path):
    first = started(tmp_path, tmp_path / "first.log", seconds=0.5)
    wait_for(lambda: lines(tmp_path / "first.log"))
    second = started(tmp_path, tmp_path / "second.log", seconds=0.01)
    wait_for(lambda: len(lines(tmp_path / "second.log")) >= 10)
    first.kill()
    second.join(60)
    assert second.exitcode == 0 and first.exitcode != 0
    assert sorted(lines(tmp_path / "second.log")) == [file[0] for file in FILES]
    assert suffixes(tmp_path) == [".json", ".npy"]


def test_a_killed_process_keeps_what_it_wrote_and_leaves_nothing_else(tmp_path):
    done = []
    for _ in range(2):
        log = tmp_path / f"{len(done)}.log"
        process = started(tmp_path, log, at_end=False)
        wait_for(lambda log=log: len(lines(log)) >= 5)
        process.kill()
        process.join(60)
        done.append(lines(log))
    (tmp_path / "cache" / next(iter((tmp_path / "cache").glob("*.npy"))).name.replace(".npy", "x.npy")).touch()
    (tmp_path / "cache" / f"{opened(tmp_path).prefix}1.json.7.tmp").touch()
    written = [file[0] for file in FILES if file in opened(tmp_path)]
    assert 8 <= len(written) < 20 and len(set(done[0]) & set(done[1])) <= 2  # the batch that was under way
    seen, values = filled(tmp_path)
    assert values == expected()
    assert sorted([file[0] for file in seen] + written) == [file[0] for file in FILES]
    assert suffixes(tmp_path) == [".json", ".npy"]


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    process = started(tmp_path, tmp_path / "log", seconds=0.3)
    wait_for(lambda: lines(tmp_path / "log"))
    beside = tmp_path / "cache" / f"{opened(tmp_path).prefix}1.json.7.tmp"
    beside.touch()
    with opened(tmp_path)._lock():
        pass
    assert beside.exists() and process.is_alive()
    process.join(60)
    assert process.exitcode == 0 and not beside.exists() and suffixes(tmp_path) == [".json", ".npy"]
