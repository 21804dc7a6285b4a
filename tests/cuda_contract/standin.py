"""A stand-in for one CUDA GPU on a CPU-only torch; the README says what it refuses, counts and cannot see.

    gpu = standin.install("h100")  # before torch is imported
    …                              # the program runs, with --device cuda
    print(gpu.report())

Each operation on a CudaTensor is computed by the CPU on the plain tensor that it holds.
"""

import collections
import contextlib
import ctypes
import importlib.util
import os
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

HERE = Path(__file__).resolve().parent
GPUS = {  # compute capability, name, memory in bytes
    "h100": ((9, 0), "NVIDIA H100 80GB HBM3", 80 << 30),
    "t4": ((7, 5), "Tesla T4", 16 << 30),
}


def build():
    """Compile guard.cpp for this torch, once, and return the library's path."""
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    source, built = HERE / "guard.cpp", HERE / f"guard-{(torch / 'version.py').stat().st_mtime_ns}.so"
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        partial = built.with_suffix(f".{os.getpid()}")
        words = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch / 'include'}", str(source)]
        words += [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-o", str(partial)]
        subprocess.run(words, check=True)
        partial.replace(built)
    return built


def preload():
    """Load torch's C++ libraries and the guard before torch asks for its CUDA hooks, which it does once."""
    if "torch" in sys.modules:
        raise RuntimeError("import standin before torch")
    lib = Path(importlib.util.find_spec("torch").submodule_search_locations[0]) / "lib"
    for start in ("libgomp", "libc10.so", "libtorch_cpu.so"):
        for path in lib.glob(f"{start}*"):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)


preload()

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  before torch.cuda is changed
from torch.utils import _foreach_utils  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

CUDA = torch.device("cuda", 0)
# Operations that launch nothing: views and metadata.
FREE = {
    *("detach", "alias", "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze"),
    *("squeeze", "split", "split_with_sizes", "chunk", "as_strided", "unbind", "empty", "empty_like", "empty_strided"),
    *("new_empty", "new_empty_strided", "lift_fresh", "_reshape_alias", "diagonal", "is_pinned", "_pin_memory"),
    *("unfold", "resize_", "set_", "sym_size", "sym_numel", "sym_stride", "is_same_size", "_fused_sdp_choice"),
    *("view_as_real", "_local_scalar_dense", "movedim", "record_stream", "unflatten"),
}
# Operations for whose result the host waits.
WAITS = {
    *("_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "unique_consecutive", "masked_select", "bincount"),
    *("equal", "is_nonzero", "multinomial", "unique_dim_consecutive"),
}
# CPU tensors of 0 dimensions may be operands together with CUDA tensors, but not of these.
STRICT = {
    *("cat", "stack", "mm", "addmm", "bmm", "baddbmm", "embedding", "index_select", "gather", "scatter", "scatter_"),
    *("scatter_add_", "scatter_add", "convolution", "native_layer_norm", "native_group_norm", "index_add_", "topk"),
}
# Operands of these may come from the CPU.
CROSSING = {
    *("copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index", "set_"),
    *("_has_compatible_shallow_copy_type", "is_pinned", "_copy_from"),
}


class CudaTensor(torch.Tensor):
    """A tensor of cuda:0; `inner` is the plain tensor that holds its values."""

    @staticmethod
    def __new__(cls, inner):
        form = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=CUDA, **form)
        made.inner = inner
        GPU.account(made)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return GPU.run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"{self.inner!r} [cuda:0]"

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                copied = GPU.wrapped(self.inner.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, False) if is_parameter else copied
            memo[id(self)].requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # for torch.save; the file is read with map_location="cpu"
        return self.detach().inner.clone().__reduce_ex__(protocol)

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new):  # Module.to() of a module that is on the GPU already
        assert same_form(self, new), "tensor.data = one of another form"
        self.inner = new.inner

    def tolist(self):
        GPU.waits["tolist"] += 1
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def is_pinned(self, *_):
        return False


def same_form(one, other):
    """Whether Module.to() may put `other` into the parameter `one`, as on a real GPU; else it makes a new one."""
    if not (isinstance(one, CudaTensor) or isinstance(other, CudaTensor)):
        return PLAIN["compatible"](one, other)
    if type(one) is not type(other):
        return False
    return (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())


class Mode(TorchDispatchMode):
    """Catches operations without a CudaTensor among their arguments: factories, and copies to the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return GPU.run(func, args, kwargs or {})


class Refused(RuntimeError):
    """CUDA would refuse this."""


class Gpu:
    """The one GPU, and what it was asked for since the last reset().

    Attributes:
        launches, waits, copies: counts by name.
        attention: calls of scaled_dot_product_attention by kernel, mask and dtype.
        plans: forms of inputs for which cuDNN's attention has built a plan.
        tf32: fp32 convolutions that torch may compute in TF32.
        moved: bytes that launches read and wrote, each operand and result once.
        allocated, peak: bytes; above `limit`, memory runs out.
        tape: what a graph that is being captured has recorded.
        replacements: operations whose CPU version has another name.
    """

    def __init__(self):
        self.limit, self.tape = float("inf"), None
        self.allocated = self.peak = 0
        self.sizes, self.plans, self.replacements = {}, set(), {}
        self.reset()

    def reset(self):
        self.launches, self.waits, self.copies = (collections.Counter() for _ in range(3))
        self.attention, self.tf32 = collections.Counter(), collections.Counter()
        self.moved = 0

    def account(self, tensor):
        storage = tensor.inner.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        size = -(-storage.nbytes() // 512) * 512
        if self.allocated + size > self.limit:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{self.limit / 2**20:.2f} MiB (stand-in)"
            )
        self.sizes[key] = size
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self.free, key)
        tensor.inner._storage_kept = storage  # so that the Python object lives as long as a tensor of it

    def free(self, key):
        self.allocated -= self.sizes.pop(key, 0)

    def run(self, func, args, kwargs):
        """Compute one operation, or raise what CUDA would."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        name = func._schema.name.partition("::")[2]
        ours = [x for x in flat if isinstance(x, CudaTensor)]
        cpu = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor)]
        device = kwargs.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        to_cpu = name == "_to_copy" and device is not None and torch.device(device).type == "cpu"
        if not ours and not to_cuda:
            return func(*args, **kwargs)
        self.check(func, name, ours, cpu, kwargs, to_cuda)
        crosses = to_cpu or any(x.dim() for x in cpu) or (name == "copy_" and cpu)
        if self.tape is not None and (name in WAITS or crosses):
            raise Refused(f"CUDA error: operation not permitted when stream is capturing ({func})")
        if name == "_local_scalar_dense":
            self.waits[name] += 1
            return func(ours[0].inner)
        if name == "is_pinned":
            return False
        if to_cpu or (name == "copy_" and cpu and not isinstance(args[0], CudaTensor)):
            self.copies["to the host"] += 1
            self.waits["copy to the host"] += not kwargs.get("non_blocking")
            if name == "copy_":
                return args[0].copy_(args[1].inner)
            out = func(ours[0].inner, **{**kwargs, "device": "cpu"})
            return out.clone() if out is ours[0].inner else out
        if name in ("_to_copy", "copy_") and cpu:
            self.copies["to the GPU, " + ("pinned" if cpu[0].is_pinned() else "pageable")] += 1
        elif name in CROSSING:
            self.copies["index to the GPU, pageable"] += sum(x.dim() > 0 for x in cpu)
        if name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in ours if x is not args[0]):
            self.waits["bool index"] += 1
        given = [unwrapped(x) for x in flat]
        new_args, new_kwargs = pytree.tree_unflatten(given, spec)
        if to_cuda:
            new_kwargs.update(device=torch.device("cpu"), **({"pin_memory": False} if "pin_memory" in kwargs else {}))
        found = self.replacements.get(name, func)(*new_args, **new_kwargs)
        if self.tape is not None and not func.is_view and name not in FREE:
            self.tape.append((func, new_args, new_kwargs, found))
        back = {id(value): x for x, value in zip(flat, given) if isinstance(x, CudaTensor)}
        out = pytree.tree_map(lambda x: back[id(x)] if id(x) in back else self.wrapped(x), found)
        if self.note(func, name, ours, cpu):
            self.moved += bytes_of(given, found)
        return out

    def wrapped(self, x):
        return CudaTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor) else x

    def check(self, func, name, ours, cpu, kwargs, to_cuda):
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "cuda" and (ours or to_cuda):
            raise Refused(f"Expected a 'cuda' device type for generator but found 'cpu' (in {func})")
        for tensor in cpu if ours and name not in CROSSING else ():
            if tensor.dim() or name in STRICT:
                raise Refused(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"(in {func}; the CPU's is {tuple(tensor.shape)} of {tensor.dtype})"
                )

    def note(self, func, name, ours, cpu):
        if name in WAITS:
            self.waits[name] += 1
        if name in FREE or func.is_view or (name == "_to_copy" and cpu):
            return False
        self.launches[name] += 1
        if "convolution" in name and torch.backends.cudnn.allow_tf32 and any(x.dtype == torch.float32 for x in ours):
            self.tf32[name] += 1
        return True

    def counts(self):
        """Return launches, copies, waits and bytes since the last reset."""
        sums = {name: sum(getattr(self, name).values()) for name in ("launches", "copies", "waits")}
        return {**sums, "bytes": self.moved}

    def report(self):
        lines = [f"{name} {count}" for name, count in self.counts().items()]
        lines += [f"{name}: {counted(getattr(self, name), 14)}" for name in ("launches", "copies", "waits")]
        lines.append(f"attention: {counted(self.attention)}; {len(self.plans)} cuDNN plans")
        lines.append(f"memory {self.allocated / 1e6:.1f} MB, peak {self.peak / 1e6:.1f} MB")
        return "\n".join(lines)


def bytes_of(*values):
    tensors = {id(x): x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def unwrapped(x):
    if isinstance(x, CudaTensor):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def counted(counter, most=None):
    return ", ".join(f"{name} {count}" for name, count in counter.most_common(most)) or "none"


class Graph:
    """A CUDA graph: what was captured is computed again at each replay, in the same memory."""

    def __init__(self, keep_graph=False):
        self.tape = []

    def replay(self):
        GPU.launches["graph"] += 1
        with _disable_current_modes(), torch.no_grad():
            for function, args, kwargs, found in self.tape:
                again = function(*args, **kwargs)
                GPU.moved += bytes_of(args, kwargs, found)
                for old, new in zip(pytree.tree_leaves(found), pytree.tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)

    def pool(self):
        return (0, 0)


class Event:
    """torch.cuda.Event; everything has happened when the next operation starts."""

    def record(self, stream=None):
        pass

    def synchronize(self):
        GPU.waits["event"] += 1


@contextlib.contextmanager
def capturing(graph, pool=None, stream=None, capture_error_mode="global"):
    """torch.cuda.graph."""
    GPU.tape = graph.tape
    try:
        yield
    finally:
        GPU.tape = None


GPU = Gpu()
PLAIN = {"compatible": torch._has_compatible_shallow_copy_type, "run": threading.Thread.run}


def install(gpu="h100"):
    """Give torch one CUDA GPU with $STANDIN_MB megabytes, and return it."""
    capability, name, memory = GPUS[gpu]
    GPU.limit = memory = int(float(os.environ.get("STANDIN_MB", memory / 1e6)) * 1e6)
    properties = types.SimpleNamespace(
        **dict(major=capability[0], minor=capability[1], name=name, total_memory=memory, multi_processor_count=132),
        **dict(gcnArchName="", L2_cache_size=50 << 20, warp_size=32, regs_per_multiprocessor=65536),
    )
    nothing = ("set_device", "_lazy_init", "init", "manual_seed_all", "manual_seed", "set_rng_state", "empty_cache")
    for target, made in {
        **dict.fromkeys(nothing, lambda *given, **named: None),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "synchronize": lambda device=None: GPU.waits.update(["synchronize"]),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: name,
        "mem_get_info": lambda device=None: (memory - GPU.allocated, memory),
        "memory_allocated": lambda device=None: GPU.allocated,
        "max_memory_allocated": lambda device=None: GPU.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(GPU, "peak", GPU.allocated),
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "is_current_stream_capturing": lambda: GPU.tape is not None,
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": capturing,
    }.items():
        setattr(torch.cuda, target, made)
    torch.accelerator.is_available = lambda: True
    import attention

    torch.nn.functional.scaled_dot_product_attention = attention.sdpa
    GPU.replacements.update(attention.AS_ON_CPU)
    torch._has_compatible_shallow_copy_type = same_form
    _foreach_utils._foreach_supported_types.append(CudaTensor)  # as optimizers and gradient clipping ask

    def run(thread):  # both settings belong to a thread
        torch._C._set_only_lift_cpu_tensors(True)
        Mode().__enter__()
        PLAIN["run"](thread)

    threading.Thread.run = run
    torch._C._set_only_lift_cpu_tensors(True)
    Mode().__enter__()
    return GPU
