"""Files and folders that appear complete or not at all."""

import errno
import os

import pytest

from utils.files import atomic_write, check_writable, errors_name, replace_folder


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_appears_when_the_block_ends(sync, tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_write(path, text=True, sync=sync) as file:
        file.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == b"\xc3\xa9\n" and files_in(path.parent) == ["a.txt"]
    with open(path, "rb") as before, atomic_write(path, sync=sync) as file:
        with open(file.name, "wb") as by_name:
            by_name.write(b"new")
        assert before.read() == b"\xc3\xa9\n"
    assert path.read_bytes() == b"new" and files_in(path.parent) == ["a.txt"]


def test_an_error_leaves_the_old_file_and_names_it(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_write(tmp_path / "a") as file:
            file.write(b"half of the")
            raise error
        assert getattr(error, "filename", str(tmp_path / "a")) == str(tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"old" and files_in(tmp_path) == ["a"]
    with pytest.raises(OSError) as caught, errors_name("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")
    assert caught.value.filename == "/dev/full"


@pytest.mark.parametrize("before", [None, "empty", "full"])
def test_a_folder_appears_when_the_block_ends(before, tmp_path):
    target = tmp_path / "deep" / "set"
    if before:
        target.mkdir(parents=True)
    if before == "full":
        (target / "old").touch()
    with pytest.raises(KeyboardInterrupt), replace_folder(target) as draft:
        (draft / "half").touch()
        raise KeyboardInterrupt
    assert files_in(target.parent) == (["set"] if before else [])
    assert not before or files_in(target) == (["old"] if before == "full" else [])
    with replace_folder(target) as draft:
        (draft / "new").touch()
    assert files_in(target) == ["new"] and files_in(target.parent) == ["set"]


def test_a_folder_is_tried_before_hours_are_spent(tmp_path):
    check_writable(tmp_path / "new" / "folder", "--output-dir")
    assert files_in(tmp_path / "new" / "folder") == []
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=rf"^--output-dir {folder}: cannot be written \("):
            check_writable(folder, "--output-dir")
    assert files_in(tmp_path) == ["file", "new"] and (tmp_path / "file").read_text() == "in the way"


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old").touch()
    replace = os.replace

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError), replace_folder(tmp_path / "set") as draft:
        (draft / "new").touch()
    assert files_in(tmp_path) == ["set"] and files_in(tmp_path / "set") == ["old"]
