"""Sampling on GPUs with one CUDA graph for each pass: hundreds of kernels start with a single call from the host."""

import logging
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from models.packed_sampler import PackedStepper
from models.sampling import Sampling, SamplingState

logger = logging.getLogger("minidalle")
MOST_GRAPHS = 16  # for other windows or settings of the same batch size


class CapturedStepper(PackedStepper):
    """A PackedStepper that captures its passes, the choice of codes included, for the current batch size.

    A graph reads and writes fixed memory, so batches of one shape share their buffers, and every pass reads all slots
    of the caches, with a mask.
    """

    capturing = True  # False once a capture has failed

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.graphs: Dict[Tuple[Sampling, int], Tuple[Any, Tensor]] = {}  # with what advance returns
        self.buffers: List[Tensor] = []

    @torch.no_grad()
    def hold(self, state: SamplingState) -> SamplingState:
        """See Stepper."""
        found = [*state, self.positions, self.images, *(layer.cache for _, layer in self.layers)]
        if [x.shape for x in found] == [x.shape for x in self.buffers]:
            for buffer, new in zip(self.buffers, found):
                buffer.copy_(new)
        else:
            self.buffers, self.graphs = found, {}
        count = len(state)
        self.positions, self.images, *caches = self.buffers[count:]
        for (_, layer), cache in zip(self.layers, caches):
            layer.cache = cache
        return SamplingState(*self.buffers[:count])

    def release(self, state: SamplingState) -> SamplingState:
        """Keep all rows, because a graph has a fixed number of them."""
        return state

    def last_place(self, inputs: Tensor) -> int:
        """Return the last place of all, so that shapes depend on nothing and the host need not wait."""
        return self.dalle.image_seq_len - 1

    @torch.no_grad()
    def advance(self, state: SamplingState, sampling: Sampling, window: int) -> Tensor:
        """See Stepper. The result is valid until the next call."""
        name = sampling, window
        if self.capturing and name not in self.graphs:
            self.capture(state, sampling, window)
        if name not in self.graphs:
            return super().advance(state, sampling, window)
        self.passes += 1
        graph, result = self.graphs[name]
        graph.replay()
        return result

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
            logger.info("passes are not captured, which only costs speed: %s", str(error).splitlines()[0])
            self.capturing = False
            return
        finally:
            self.passes = passes
        if len(self.graphs) >= MOST_GRAPHS:
            self.graphs.clear()
        self.graphs[sampling, window] = graph, result
