"""Foreign checkpoints: the same tensors as torch.load gives, no pickled code run, damage reported in one line."""

import collections
import functools
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from utils.foreign_pickle import STREAM_HEADER, read_entries, read_module, read_weights

BOTH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])


class Reference:
    """A persistent id as torch.save writes for a storage, or with any other content."""

    def __init__(self, *content):
        self.content = content


class Call:
    """An object that is pickled as a call of `function`, which may be a call itself."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __call__(self):
        raise AssertionError("only to be pickled")

    def __reduce__(self):
        return self.function, self.arguments


def storage(key="0", count=4, kind=torch.FloatStorage):
    return Reference("storage", kind, key, "cpu", count)


def tensor(reference, size, stride, offset=0):
    return Call(torch._utils._rebuild_tensor_v2, reference, offset, size, stride, False, collections.OrderedDict())


def pickled(value):
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=2)
    pickler.persistent_id = lambda value: value.content if isinstance(value, Reference) else None
    pickler.dump(value)
    return file.getvalue()


def write_zip(path, program, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", program)
        for key, content in records.items():
            archive.writestr(f"a/data/{key}", content)
    return path


def write_stream(path, program, records):
    content = b"".join(map(pickled, [*STREAM_HEADER, {"little_endian": True}])) + program + pickled(list(records))
    path.write_bytes(content + b"".join(struct.pack("<q", len(data) // 4) + data for data in records.values()))
    return path


def write(path, value, zipped):
    """Write References and Calls, with one storage, "0", of four floats."""
    return (write_zip if zipped else write_stream)(path, pickled(value), {"0": struct.pack("<4f", 1, 2, 3, 4)})


def save(path, value, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(weights, expected):
    assert list(weights) == list(expected)
    for name, weight in expected.items():
        found = weights[name]
        assert (found.dtype, found.shape, found.stride()) == (weight.dtype, weight.shape, weight.stride()), name
        assert torch.equal(found, weight), name


def assert_refused(path, message="."):
    with pytest.raises(ValueError, match=message) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path}: not a VQGAN checkpoint") and "\n" not in str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.ckpt"


@BOTH_FORMATS
def test_every_dtype_comes_back(path, zipped):
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    state = {name: (torch.randn(3, 5) * 9).to(getattr(torch, name)) for name in names}
    state.update({f"{name} none": values[:0].clone() for name, values in state.items()})
    save(path, {**state, "one": torch.tensor(2.5)}, zipped)
    assert_same(read_weights(path), torch.load(path))


@BOTH_FORMATS
def test_strided_shared_and_wrapped_tensors_come_back(path, zipped):
    base = torch.arange(24.0).reshape(4, 6)
    state = collections.OrderedDict(base=base, view=base[1::2, 2:5], turned=base.t(), wide=base[0, 1].expand(3, 2))
    state.update(parameter=nn.Parameter(torch.ones(2)), again=state["base"], alone=torch.zeros(3))
    state._metadata = {"": {"version": 1}}  # as Module.state_dict leaves it
    save(path, state, zipped)
    weights = read_weights(path)
    assert_same(weights, torch.load(path))
    weights["base"][1, 2] = -1  # shared memory stays shared
    assert weights["view"][0, 0] == -1 and weights["turned"][2, 1] == -1 and weights["alone"].sum() == 0


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_pickle_protocol_is_read(path, protocol):
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 3))
    torch.save({"state_dict": network.state_dict(), "nested": [{}, (), (1, 2, 3, 4)]}, path, pickle_protocol=protocol)
    assert_same(read_weights(path), network.state_dict())


@BOTH_FORMATS
def test_a_lightning_checkpoint_opens_without_its_classes(path, zipped, monkeypatch):
    module = types.ModuleType("vanished")
    callback = module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "vanished"})
    state = {f"encoder.{name}": weight for name, weight in nn.Conv2d(3, 4, 2).state_dict().items()}
    loss = {f"loss.critic.{name}": weight for name, weight in nn.Linear(7, 7).state_dict().items()}
    best = {"best_model_score": torch.tensor(1.5), "best_model_path": "/logs/é.ckpt", "dirpath": None}
    adam = {"state": {0: {"step": 1, "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 4.5e-6, "params": [0]}]}
    saved = {"epoch": 3, "global_step": 1 << 40, "callbacks": {callback: best}, "optimizer_states": [adam]}
    saved.update(hyper_parameters={"betas": (0.5, 0.9)}, state_dict={**state, **loss})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "vanished", module)
        save(path, saved, zipped)
        save(path.with_name("instance"), {"callbacks": [callback()], "state_dict": {}}, zipped)
    with pytest.raises((ModuleNotFoundError, pickle.UnpicklingError)):
        torch.load(path, weights_only=False)
    assert_same(read_weights(path, skip=["loss."]), state)
    assert list(read_weights(path)) == [*state, *loss]
    assert read_weights(path.with_name("instance")) == {}
    assert "vanished" not in sys.modules


def test_tensors_that_are_skipped_are_not_read(path):
    value = {"a": tensor(storage("0", 2), (2,), (1,)), "loss.b": tensor(storage("1", 1 << 40), (1 << 40,), (1,))}
    write_zip(path, pickled(value), {"0": struct.pack("<2f", 5, 6)})
    assert read_weights(path, skip=("loss.",))["a"].tolist() == [5, 6]
    assert_refused(path, "a/data/1")


def attacks(marker):
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    run = Call(os.system, touch)
    rebuild, (*arguments, _) = torch.ones(1).__reduce_ex__(2)
    return {
        "os.system": run,
        "subprocess": Call(subprocess.check_call, ["touch", str(marker)]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "getattr chain": Call(Call(getattr, Call(__import__, "os"), "system"), touch),
        "torch.load inside": Call(functools.partial(torch.load, weights_only=False), f"{marker}.pt"),
        "tensor's hooks": Call(rebuild, *arguments, run),
        "dictionary of pairs": Call(collections.OrderedDict, [("x", run)]),
    }


@BOTH_FORMATS
@pytest.mark.parametrize("attack", attacks(""))
def test_nothing_pickled_is_run(path, attack, zipped):
    marker = path.with_name("it_ran")
    evil = attacks(marker)[attack]
    torch.save({"w": Call(os.system, f"touch {marker}")}, f"{marker}.pt")
    for value in ({"state_dict": {"w": evil}}, evil, {"a": evil, "state_dict": {"w": torch.ones(2)}}):
        torch.load(save(path, value, zipped), weights_only=False)
        assert marker.exists()  # the attack is a real one
        marker.unlink()
        if value is not evil and "a" in value:
            assert read_weights(path)["w"].tolist() == [1, 1]
        elif attack != "tensor's hooks":  # a tensor without its hooks is one
            assert_refused(path)
        assert not marker.exists()


def test_functions_that_are_only_stored_are_inert(path, tmp_path, monkeypatch):
    (tmp_path / "runs_when_imported.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\nclass Thing: pass\n")
    program = pickled({"x": [os.system, eval], "y": {os.popen: 1}, "state_dict": {}})
    program = program.replace(b"cposix\nsystem\n", b"cruns_when_imported\nThing\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert b"runs_when" in program and read_weights(write_zip(path, program, {})) == {}
    assert "runs_when_imported" not in sys.modules and not (tmp_path / "it_ran").exists()


SYSTEM = b"cposix\nsystem\n"
OTHER_PROGRAMS = {  # by hand, as no pickler writes them
    "INST": b"(S'touch it_ran'\niposix\nsystem\n.",
    "OBJ": b"(" + SYSTEM + b"S'touch it_ran'\no.",
    "NEWOBJ": b"\x80\x02" + SYSTEM + b"U\x0ctouch it_ran\x85\x81.",
    "names as separate texts": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch it_ran\x85R.",
    "a name of two lines": b"\x80\x04\x8c\x05posix\x8c\x07sys\ntem\x93\x8c\x0ctouch it_ran\x85R.",
    "BUILD on a function": b"\x80\x02" + SYSTEM + b"}U\x08__call__U\x01xsb.",
    "an extension code": b"\x80\x02\x82\x01.",
    "the id of a text line": b"Ptouch it_ran\n.",
}


@pytest.mark.parametrize("program", OTHER_PROGRAMS.values(), ids=OTHER_PROGRAMS)
def test_other_ways_to_call_are_refused(path, program, monkeypatch):
    monkeypatch.chdir(path.parent)
    assert_refused(write_zip(path, program, {}))
    assert_refused(write_stream(path, program, {}))
    path.write_bytes(program)
    assert_refused(path)
    assert not os.path.exists("it_ran")


def test_a_forged_memo_index_takes_no_memory(path):
    program = b"\x80\x02}r" + struct.pack("<I", (1 << 32) - 2) + b"."
    assert read_weights(write_zip(path, program, {})) == {}


@BOTH_FORMATS
def test_settings_of_any_kind_beside_the_weights_are_inert(path, zipped):
    import argparse
    import pathlib

    from omegaconf import OmegaConf

    config = OmegaConf.create({"model": {"params": {"ch_mult": [1, 2], "ckpt": "${oc.env:HOME}"}}})
    namespace = argparse.Namespace(best=np.float64(1.5), path=pathlib.PurePosixPath("/a"), table=np.arange(3))
    beside = {"hyper_parameters": config, "args": namespace, "counts": collections.Counter("aab"), "seen": {1, 2}}
    save(path, {**beside, "state_dict": {"w": torch.ones(2)}}, zipped)
    assert read_weights(path)["w"].tolist() == [1, 1]
    save(path, {"state_dict": {"w": torch.ones(2), "step": np.float64(1.5)}}, zipped)
    assert_refused(path, "'step' is not a tensor, but numpy.*scalar")


@pytest.mark.parametrize("wrap", [("module.",), ("first_stage_model.",), ("", "ema_model.")], ids=str)
@pytest.mark.parametrize("keys", [(), ("state_dict",), ("model",), ("state", "generator")], ids=str)
def test_an_anchor_finds_wrapped_weights(path, keys, wrap):
    state = {f"{prefix}{name}": torch.tensor([float(number)]) for number, prefix in enumerate(wrap) for name in "ab"}
    saved = {**state, "other.c": torch.zeros(1)}
    for key in reversed(keys):
        saved = {"epoch": 3, "more": {"x": 1}, key: saved}
    weights = read_weights(save(path, saved), anchor="a", skip=("ema_model.", "other."))
    assert {name: value.item() for name, value in weights.items()} == {"a": 0, "b": 0}
    with pytest.raises(ValueError, match="no tensor of it is named quantize.x"):
        read_weights(path, anchor="quantize.x")


LIES = {
    "longer than its storage": tensor(storage(), (5,), (1,)),
    "strides past the end": tensor(storage(), (2, 2), (3, 1)),
    "offset past the end": tensor(storage(), (4,), (1,), offset=1),
    "negative stride": tensor(storage(), (4,), (-1,), offset=3),
    "negative size": tensor(storage(), (-1,), (1,)),
    "float as a size": tensor(storage(), (2.0,), (1,)),
    "more sizes than strides": tensor(storage(), (2, 2), (1,)),
    "2^50 elements out of one": tensor(storage(), (1 << 25, 1 << 25), (0, 0)),
    "text as sizes": tensor(storage(), "4", (1,)),
    "module as storage": tensor(Reference("module", torch.FloatStorage, "0", "cpu", 4), (4,), (1,)),
    "storage one too long": tensor(storage(count=5), (4,), (1,)),
    "storage one too short": tensor(storage(count=3), (3,), (1,)),
    "storage of 2^46": tensor(storage(count=1 << 46), (4,), (1,)),
    "storage that is not there": tensor(storage(key="1"), (4,), (1,)),
    "number as storage key": tensor(storage(key=0), (4,), (1,)),
    "storage of another type": tensor(storage(kind=torch.DoubleStorage), (2,), (1,)),
    "function as type": tensor(storage(kind=os.system), (4,), (1,)),
    "text as type": tensor(storage(kind="FloatStorage"), (4,), (1,)),
    "storage as type": tensor(Reference("storage", storage(), "0", "cpu", 4), (4,), (1,)),
    "storage as key": tensor(Reference("storage", torch.FloatStorage, storage(), "cpu", 4), (4,), (1,)),
    "reference to a reference": tensor(Reference(storage()), (4,), (1,)),
    "storage instead of a tensor": storage(),
    "class instead of a tensor": torch.Size,
}


@BOTH_FORMATS
def test_a_tensor_that_is_not_in_its_storage_is_refused(path, zipped):
    good = read_weights(write(path, {"w": tensor(storage(), (2, 2), (1, 2))}, zipped))
    assert good["w"].tolist() == [[1, 3], [2, 4]]
    for lie, value in LIES.items():
        message = "reaches element 4 of a storage of 4" if lie.endswith("past the end") else "."
        assert_refused(write(path, {"state_dict": {"w": value}}, zipped), message)


@BOTH_FORMATS
def test_a_storage_described_twice_takes_no_memory(path, zipped):
    # The stream format says how long a storage is once more; only one of two descriptions would be held against it.
    write(path, {"a": tensor(storage(count=1 << 26), (4,), (1,)), "b": tensor(storage(), (4,), (1,))}, zipped)
    assert peak_memory(lambda: assert_refused(path, "storage 0 in two ways")) < 1 << 22


def test_settings_and_modules_that_hold_themselves_many_times_over_are_refused(path):
    values = list(range(4000))
    for _ in range(2):
        values = [values] * 4000
    torch.save({"hparams": values, "weights": {"w": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match="more than 100000 values"):
        read_entries(path, "weights")
    module = nn.Linear(1, 1)
    for _ in range(30):
        module = nn.ModuleList([module, module])
    torch.save(module, path)
    with pytest.raises(ValueError, match="more than 100000 modules"):
        read_module(path)


def peak_memory(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_deep_nesting_is_no_crash(path):
    deep = b"]" * 50_000 + b"a" * 49_999
    assert_refused(write_zip(path, b"\x80\x02" + deep + b".", {}), "holds no state dict")
    assert_refused(write_zip(path, b"\x80\x02}X\x01\0\0\0w" + deep + b"s.", {}), "'w' is not a tensor")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_other_files_are_refused(path):
    words, pickles = [b"", b"some text\n", b"PK\x03\x04", b"\x80"], [{"w": 1}, {"w": {1}}, [], None]
    for content in words + list(map(pickle.dumps, pickles)):
        path.write_bytes(content)
        assert_refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes/readme.txt", "hello")
    assert_refused(path, "without the data.pkl of torch.save")
    assert_refused(write_zip(path, pickled({}), {"0": bytes(9999)}, zipfile.ZIP_DEFLATED), "compressed")
    for name, content, message in (("data.pkl", pickled({}), "twice"), ("byteorder", b"big", "big-endian")):
        with zipfile.ZipFile(write_zip(path, pickled({}), {}), "a") as archive:
            archive.writestr(f"a/{name}", content)
        assert_refused(path, message)
    path.write_bytes(b"".join(map(pickled, [*STREAM_HEADER, {"little_endian": False}, {}, []])))
    assert_refused(path, "big-endian")


def small_checkpoint(path, zipped):
    state = {"a": torch.randn(3, 4), "b": torch.arange(5).half(), "c": torch.randn(4, 4)[::2, 1:].t()}
    return save(path, {"callbacks": {zipfile.ZipFile: 1.5}, "epoch": 3, "state_dict": state}, zipped).read_bytes()


@BOTH_FORMATS
def test_a_file_cut_anywhere_is_refused(path, zipped):
    whole = small_checkpoint(path, zipped)
    for length in [*random.Random(0).sample(range(len(whole)), 60), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert_refused(path)


@BOTH_FORMATS
def test_damage_is_never_another_exception(path, zipped):
    whole, choice, refused = small_checkpoint(path, zipped), random.Random(0), 0
    for _ in range(200):
        content = bytearray(whole)
        content[choice.randrange(len(content))] ^= choice.randrange(1, 256)
        path.write_bytes(content)
        try:
            weights = read_weights(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            assert all(isinstance(weight, torch.Tensor) for weight in weights.values())
    assert 20 < refused < 200


@pytest.mark.parametrize("place", [40, 48], ids=["length", "position"])
@pytest.mark.parametrize("value", [1 << 20, 1 << 62])
def test_an_archive_directory_that_points_outside_the_file_is_damage(path, place, value):
    content = bytearray(save(path, {"w": torch.ones(3)}).read_bytes())
    struct.pack_into("<Q", content, content.rindex(b"PK\6\6") + place, value)
    path.write_bytes(content)
    assert_refused(path, "damaged")
