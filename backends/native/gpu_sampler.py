"""Sampling on CUDA GPUs: passes that are captured as graphs, and Triton's kernels where they work."""

import contextlib
import functools
import logging
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor

from models.packed_sampler import LayerKernels, PackedStepper
from models.sampling import Generators, Sampling, SamplingState, make_gumbel_, settle
from utils.errors import first_line

logger = logging.getLogger("minidalle")
MOST_GRAPHS = 16  # for other windows or settings of the same batch size


class CapturedStepper(PackedStepper):
    """A PackedStepper for GPUs that captures its passes, with the choice of codes, for the current batch size.

    Its kernels, about a hundred, then start with a single call from the host. A graph reads and writes fixed memory, so
    batches of one shape share their buffers. Shapes are those of the last place; Triton's kernels read only the slots
    of the caches that are used so far, PyTorch's operators all of them, with a mask.
    """

    capturing = True  # False once a capture has failed
    passes_ahead = 1  # so that the GPU need not wait for the host, which reads an outcome during the next pass

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.graphs: Dict[Tuple[Sampling, int], Tuple[Any, Tensor]] = {}  # with what advance returns
        device = self.dalle.text_emb.weight.device
        self.uniform_numbers = find_uniform_numbers(device)
        if self.cache_dtype != torch.float32:
            self.settle = find_settle(device)
        self.buffers: List[Tensor] = []

    def noise(self, batch: int, generator: Generators) -> Tensor:
        """See Stepper. A GPU generates the CPU's numbers sooner than it gets them from there."""
        length, codes = self.dalle.image_seq_len, self.dalle.num_image_tokens
        if self.uniform_numbers is not None and isinstance(generator, list) and len(generator) == batch:
            with contextlib.suppress(ValueError):
                return make_gumbel_(self.uniform_numbers(generator, length * codes).view(batch, length, codes))
        return super().noise(batch, generator)

    @torch.no_grad()
    def hold(self, state: SamplingState) -> SamplingState:
        """See Stepper."""
        found = [*state, self.positions, self.images, self.sharers, *(layer.cache for layer in self.layers)]
        if [x.shape for x in found] == [x.shape for x in self.buffers]:
            for buffer, new in zip(self.buffers, found):
                buffer.copy_(new)
        else:
            self.buffers, self.graphs = found, {}
        count = len(state)
        self.positions, self.images, self.sharers, *caches = self.buffers[count:]
        for layer, cache in zip(self.layers, caches):
            layer.cache = cache
        return SamplingState(*self.buffers[:count])

    def release(self, state: SamplingState) -> SamplingState:
        """Keep all rows, because a graph has a fixed number of them."""
        return state

    def last_place(self, inputs: Tensor) -> int:
        """Return the last place of all, so that shapes depend on nothing and the host need not wait."""
        return self.dalle.image_seq_len - 1

    @torch.no_grad()
    def advance(self, state: SamplingState, sampling: Sampling, window: int) -> "Outcome":
        """See Stepper. A window that would reach past the image's end is not cut, which saves a graph."""
        window = min((each for each in self.windows if each >= window), default=window)
        name = sampling, window
        if self.capturing and name not in self.graphs:
            self.capture(state, sampling, window)
        if name not in self.graphs:
            return Outcome(super().advance(state, sampling, window))
        self.passes += 1
        graph, result = self.graphs[name]
        graph.replay()
        return Outcome(result)

    def capture(self, state: SamplingState, sampling: Sampling, window: int) -> None:
        """Capture a pass; if that fails, log it and compute eagerly from now on."""
        before = state.codes.clone(), state.places.clone()
        graph, passes = torch.cuda.CUDAGraph(), self.passes
        try:
            super().advance(state, sampling, window)  # allocates what libraries need
            state.codes.copy_(before[0])
            state.places.copy_(before[1])
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = super().advance(state, sampling, window)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            logger.info("passes are not captured, which only costs speed: %s", first_line(error))
            self.capturing = False
            return
        finally:
            self.passes = passes
        if len(self.graphs) >= MOST_GRAPHS:
            self.graphs.clear()
        self.graphs[sampling, window] = graph, result


class Outcome:
    """A tensor of a GPU on its way to the host."""

    def __init__(self, tensor: Tensor):
        self.host, self.arrival = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
        self.arrival.record()

    def tolist(self) -> List[int]:
        """Wait for the tensor alone, not for what the GPU computes since, and return its values."""
        self.arrival.synchronize()
        return self.host.tolist()


@functools.lru_cache(maxsize=None)
def fastest_kernels(device: torch.device, dtype: torch.dtype) -> Optional[LayerKernels]:
    """Return Triton's kernels for half precision on GPUs; None for PyTorch's operators, also if those fail."""
    if dtype == torch.float32:
        return None
    for multiplies in (True, False):
        with triton_missing("products" if multiplies else "kernels of layers"):
            from backends.native.gpu_kernels import TritonKernels, kernels_work

            if kernels_work(device, dtype, multiplies):
                return TritonKernels(dtype, multiplies)
    return None


@functools.lru_cache(maxsize=None)
def find_settle(device: torch.device) -> Callable[..., Tensor]:
    """Return the fastest equivalent of models.sampling.settle."""
    with triton_missing("choice of codes"):
        from backends.native import gpu_choice

        return gpu_choice.settle if gpu_choice.settle_works(device) else settle
    return settle


@functools.lru_cache(maxsize=None)
def find_uniform_numbers(device: torch.device) -> Optional[Callable[[List[torch.Generator], int], Tensor]]:
    """Return a function from the CPU's generators and a count to their next numbers (B, count), if a GPU has one."""
    with triton_missing("random numbers"):
        from backends.native.gpu_choice import numbers_work, uniform_numbers

        return functools.partial(uniform_numbers, device=device) if numbers_work(device) else None
    return None


@contextlib.contextmanager
def triton_missing(what: str) -> Iterator[None]:
    """Log an error of the block, since Triton, a compiler or a driver's part is missing, and end the block."""
    try:
        yield
    except Exception as error:
        logger.info("sampling does without Triton's %s, which only costs speed: %s", what, first_line(error))
