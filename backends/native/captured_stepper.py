"""Sampling on GPUs with one CUDA graph for each pass: hundreds of kernels start with a single call from the host."""

import logging
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from models.packed_sampler import PackedStepper

logger = logging.getLogger("minidalle")
Captured = Tuple[Any, Tensor, Tensor, Tensor]  # graph, its inputs codes and places, its logits


class CapturedStepper(PackedStepper):
    """A PackedStepper that captures its passes, one graph for each window of the current batch size.

    A graph reads and writes fixed memory, so batches of one shape share their buffers, and every pass reads all slots
    of the caches, with a mask.
    """

    capturing = True  # False once a capture has failed

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.graphs: Dict[torch.Size, Captured] = {}
        self.buffers: List[Tensor] = []

    @torch.no_grad()
    def begin(self, text: Tensor, codes: Tensor) -> Tensor:
        """See Stepper."""
        logits = super().begin(text, codes)
        found = [self.positions, self.images, *(layer.cache for _, layer in self.layers)]
        if [x.shape for x in found] == [x.shape for x in self.buffers]:
            for buffer, new in zip(self.buffers, found):
                buffer.copy_(new)
        else:
            self.buffers, self.graphs = found, {}
        self.positions, self.images, *caches = self.buffers
        for (_, layer), cache in zip(self.layers, caches):
            layer.cache = cache
            layer.text, layer.codes = cache.tensor_split([layer.table.text_len], dim=3)
        return logits

    def last_place(self, inputs: Tensor) -> int:
        """Return the last place of all, so that shapes depend on nothing and the host need not wait."""
        return self.dalle.image_seq_len - 1

    @torch.no_grad()
    def next(self, codes: Tensor, places: Tensor) -> Tensor:
        """See Stepper. The logits are valid until the next call."""
        if self.capturing and codes.shape not in self.graphs:
            self.capture(codes, places)
        if codes.shape not in self.graphs:
            return super().next(codes, places)
        self.passes += 1
        graph, codes_input, places_input, logits = self.graphs[codes.shape]
        codes_input.copy_(codes)
        places_input.copy_(places)
        graph.replay()
        return logits

    def capture(self, codes: Tensor, places: Tensor) -> None:
        """Capture a pass of this shape; if that fails, log it and compute eagerly from now on."""
        codes, places = codes.clone(), places.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            super().next(codes, places)  # allocates what libraries need; it writes what the pass itself writes
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = super().next(codes, places)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            logger.info("passes are not captured, which only costs speed: %s", str(error).splitlines()[0])
            self.capturing = False
            return
        self.graphs[codes.shape] = graph, codes, places, logits
