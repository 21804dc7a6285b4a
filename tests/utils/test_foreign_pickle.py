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
import types
import zipfile
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from tests.builders import PickledCall, one_line
from utils.foreign_pickle import STREAM_HEADER, read_weights

BOTH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])


class Reference:
    """A persistent id as torch.save writes for a storage, or with any other content."""

    def __init__(self, *content):
        self.content = content


def storage(key="0", count=4, kind=torch.FloatStorage):
    return Reference("storage", kind, key, "cpu", count)


def tensor(reference, size, stride, offset=0):
    hooks = collections.OrderedDict()
    return PickledCall(torch._utils._rebuild_tensor_v2, reference, offset, size, stride, False, hooks)


def pickled(value):
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=2)
    pickler.persistent_id = lambda value: value.content if isinstance(value, Reference) else None
    pickler.dump(value)
    return file.getvalue()


def write_zip(path, program, records):
    with zipfile.ZipFile(path, "w") as archive:
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
    torch.testing.assert_close(weights, expected, atol=0, rtol=0, check_stride=True)


def assert_refused(path, message="."):
    with one_line(f"^{path}: not a VQGAN checkpoint.*{message}"):
        read_weights(path, "w")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.ckpt"


@BOTH_FORMATS
def test_tensors_of_every_dtype_strided_shared_and_wrapped_come_back(path, zipped):
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    dtypes = {name: (torch.randn(3, 5) * 9).to(getattr(torch, name)) for name in names}
    dtypes.update({f"{name} none": values[:0].clone() for name, values in dtypes.items()})
    base = torch.arange(24.0).reshape(4, 6)
    state = collections.OrderedDict(base=base, view=base[1::2, 2:5], turned=base.t(), wide=base[0, 1].expand(3, 2))
    state.update(parameter=nn.Parameter(torch.ones(2)), again=state["base"], alone=torch.zeros(3), **dtypes)
    state._metadata = {"": {"version": 1}}  # as Module.state_dict leaves it
    save(path, state, zipped)
    weights = read_weights(path, "base")
    assert_same(weights, torch.load(path))
    weights["base"][1, 2] = -1  # shared memory stays shared
    assert weights["view"][0, 0] == -1 and weights["turned"][2, 1] == -1 and weights["alone"].sum() == 0


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
        save(path.with_name("instance"), {"callbacks": [callback()], "state_dict": {"w": torch.ones(2)}}, zipped)
    with pytest.raises((ModuleNotFoundError, pickle.UnpicklingError)):
        torch.load(path, weights_only=False)
    assert_same(read_weights(path, "encoder.weight", ["loss."]), state)
    assert list(read_weights(path, "encoder.weight")) == [*state, *loss]
    assert list(read_weights(path.with_name("instance"), "w")) == ["w"]
    assert "vanished" not in sys.modules


def attacks(marker):
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    run = PickledCall(os.system, touch)
    rebuild, (*arguments, _) = torch.ones(1).__reduce_ex__(2)
    return {
        "os.system": run,
        "subprocess": PickledCall(subprocess.check_call, ["touch", str(marker)]),
        "eval": PickledCall(eval, code),
        "exec": PickledCall(exec, code),
        "getattr chain": PickledCall(PickledCall(getattr, PickledCall(__import__, "os"), "system"), touch),
        "torch.load inside": PickledCall(functools.partial(torch.load, weights_only=False), f"{marker}.pt"),
        "tensor's hooks": PickledCall(rebuild, *arguments, run),
        "dictionary of pairs": PickledCall(collections.OrderedDict, [("x", run)]),
    }


@BOTH_FORMATS
@pytest.mark.parametrize("attack", attacks(""))
def test_nothing_pickled_is_run(path, attack, zipped):
    marker = path.with_name("it_ran")
    evil = attacks(marker)[attack]
    torch.save({"w": PickledCall(os.system, f"touch {marker}")}, f"{marker}.pt")
    for value in ({"state_dict": {"w": evil}}, evil, {"a": evil, "state_dict": {"w": torch.ones(2)}}):
        torch.load(save(path, value, zipped), weights_only=False)
        assert marker.exists()  # the attack is a real one
        marker.unlink()
        if value is not evil and "a" in value:
            assert read_weights(path, "w")["w"].tolist() == [1, 1]
        elif attack != "tensor's hooks":  # a tensor without its hooks is one
            assert_refused(path)
        assert not marker.exists()


SYSTEM = b"cposix\nsystem\n"
OTHER_PROGRAMS = {  # by hand, as no pickler writes them
    "INST": b"(S'touch it_ran'\niposix\nsystem\n.",
    "NEWOBJ": b"\x80\x02" + SYSTEM + b"U\x0ctouch it_ran\x85\x81.",
    "names as separate texts": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch it_ran\x85R.",
    "BUILD on a function": b"\x80\x02" + SYSTEM + b"}U\x08__call__U\x01xsb.",
}


@pytest.mark.parametrize("program", OTHER_PROGRAMS.values(), ids=OTHER_PROGRAMS)
def test_other_ways_to_call_are_refused(path, program, monkeypatch):
    monkeypatch.chdir(path.parent)
    assert_refused(write_zip(path, program, {}))
    assert_refused(write_stream(path, program, {}))
    path.write_bytes(program)
    assert_refused(path)
    assert not os.path.exists("it_ran")


LIES = {
    "longer than its storage": tensor(storage(), (5,), (1,)),
    "strides past the end": tensor(storage(), (2, 2), (3, 1)),
    "offset past the end": tensor(storage(), (4,), (1,), offset=1),
    "negative stride": tensor(storage(), (4,), (-1,), offset=3),
    "negative size": tensor(storage(), (-1,), (1,)),
    "2^50 elements out of one": tensor(storage(), (1 << 25, 1 << 25), (0, 0)),
    "storage one too long": tensor(storage(count=5), (4,), (1,)),
    "storage of 2^46": tensor(storage(count=1 << 46), (4,), (1,)),
    "storage that is not there": tensor(storage(key="1"), (4,), (1,)),
    "storage of another type": tensor(storage(kind=torch.DoubleStorage), (2,), (1,)),
    "function as type": tensor(storage(kind=os.system), (4,), (1,)),
    "text as type": tensor(storage(kind="FloatStorage"), (4,), (1,)),
    "storage instead of a tensor": storage(),
    "class instead of a tensor": torch.Size,
}


@BOTH_FORMATS
def test_a_tensor_that_is_not_in_its_storage_is_refused(path, zipped):
    good = read_weights(write(path, {"w": tensor(storage(), (2, 2), (1, 2))}, zipped), "w")
    assert good["w"].tolist() == [[1, 3], [2, 4]]
    for lie, value in LIES.items():
        message = "reaches element 4 of a storage of 4" if lie.endswith("past the end") else "."
        assert_refused(write(path, {"state_dict": {"w": value}}, zipped), message)


@BOTH_FORMATS
def test_memory_that_runs_out_is_no_damage(path, zipped, monkeypatch):
    write(path, {"w": tensor(storage(), (4,), (1,))}, zipped)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "frombuffer", Mock(side_effect=MemoryError))
        read_weights(path, "w")
    monkeypatch.setattr(pickle._Unpickler, "load", Mock(side_effect=MemoryError))  # as for a forged length
    assert_refused(path)


@BOTH_FORMATS
def test_damage_is_never_another_exception(path, zipped):
    state = {"a": torch.randn(3, 4), "b": torch.arange(5).half(), "c": torch.randn(4, 4)[::2, 1:].t()}
    saved = {"callbacks": {zipfile.ZipFile: 1.5}, "epoch": 3, "state_dict": state}
    whole, choice, refused = save(path, saved, zipped).read_bytes(), random.Random(0), 0
    for _ in range(200):
        content = bytearray(whole)
        content[choice.randrange(len(content))] ^= choice.randrange(1, 256)
        path.write_bytes(content)
        try:
            weights = read_weights(path, "a")
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            assert all(isinstance(weight, torch.Tensor) for weight in weights.values())
    assert 20 < refused < 200
