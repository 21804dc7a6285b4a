"""Run models with fixed shapes: any number of rows through a program that was compiled for a fixed number.

The backend passes a function that returns Programs; this file names no SDK.
"""

import logging
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from models.dalle import DALLE
from models.sampling import CodeCallback, Generators, Sampling, check_given_codes, gumbel_noise, sample_codes
from models.static_sampling import FullPass, StaticSampler
from models.vae import VQGanVAE

logger = logging.getLogger("minidalle")


def full(x: Tensor, rows: int) -> Tensor:
    """Repeat the last row of x (n, …) so that there are `rows`."""
    return torch.cat((x, x[-1:].expand(rows - len(x), *x.shape[1:])))


class VqganDecoder(nn.Module):
    """A VQGAN's decoder as a module, from codes int (B, L) to pixels (B, 3, S, S)."""

    def __init__(self, vae: VQGanVAE):
        super().__init__()
        self.vae = vae

    def forward(self, codes: Tensor) -> Tensor:
        """Decode codes."""
        return self.vae.decode(codes)


class DeviceLosses(nn.Module):
    """A DALLE's losses of one row, int (1, T + L) of text and codes: total, text and image loss, fp32 (1, 3)."""

    def __init__(self, model: DALLE):
        super().__init__()
        self.model = model

    def forward(self, row: Tensor) -> Tensor:
        """Compute the losses."""
        text, codes = row[:, : self.model.text_seq_len], row[:, self.model.text_seq_len :]
        return torch.stack(self.model(text, codes, return_loss=True)).float()[None]


def decode_upper_rows(decode: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return decode(codes, rows=None), which can also decode only an image's upper rows of codes.

    Shapes cannot change, so the missing codes are filled in and their pixels cut off again.
    """

    def decode_rows(codes: Tensor, rows: Optional[int] = None) -> Tensor:
        if rows is None:
            return decode(codes)
        side = codes.shape[1] // rows
        pixels = decode(F.pad(codes, (0, side**2 - codes.shape[1])))
        return pixels[:, :, : pixels.shape[3] * rows // side]

    return decode_rows


class Program:
    """A module that is compiled at its first call, and holds an IPU from then on until `release`.

    Args:
        make: returns a new executor of PopTorch.
        role: what the module does. Of all programs with the same role, only the one called last holds an IPU.
        live: the programs that hold an IPU, by role.
        errors: returns a context that turns PopTorch's errors into a ValueError.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        role: str,
        live: Dict[str, "Program"],
        errors: Callable[[str], ContextManager[Any]],
    ):
        self.make, self.role, self.live, self.errors = make, role, live, errors
        self.executor: Any = None

    def compile(self, *inputs: Tensor) -> None:
        """Compile for inputs like these if the program is not compiled; ValueError, one line, if that fails."""
        if self.live.get(self.role) is self:
            return
        if self.role in self.live:
            self.live[self.role].release()
        self.executor = self.make()
        with self.errors(f"the {self.role} does not compile"):
            self.executor.compile(*inputs)
        self.live[self.role] = self

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the module."""
        self.compile(*inputs)
        with self.errors(f"the {self.role} stopped"):
            return self.executor(*inputs)

    def release(self) -> None:
        """Give up the IPU; the next call compiles the module again."""
        self.executor.destroy()
        del self.live[self.role]


class RowByRow:
    """A module for any number of rows: each call takes as many as the first one had, one after another.

    Args:
        program: returns the Program of a module that takes `device_iterations` rows.
    """

    def __init__(self, program: Callable[..., Program]):
        self.compile_for = program
        self.program: Optional[Program] = None
        self.rows = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the module to x."""
        if self.program is None:
            self.rows = len(x)
            self.program = self.compile_for(device_iterations=self.rows)
        return torch.cat([self.program(full(part, self.rows))[: len(part)] for part in x.split(self.rows)])


class DeviceSampler:
    """Backend.sampler in calls of `rows` images; the last image is repeated if fewer are needed.

    Args:
        program: returns a module's Program.
        on_device: StaticSampler's loop and update, to sample a batch in one call. If None, or if that does not compile,
            every code takes a call.
    """

    def __init__(
        self, model: DALLE, rows: int, program: Callable[..., Program], on_device: Optional[Dict[str, Callable]]
    ):
        self.model, self.rows, self.program, self.on_device = model, rows, program, on_device
        self.loops: Dict[Any, Any] = {}  # compiled StaticSamplers, by sampling settings and number of given codes
        self.stepper = FullPassStepper(self)

    def __call__(
        self,
        text: Tensor,
        sampling: Sampling = Sampling(),
        *,
        generator: Generators = None,
        image_codes: Optional[Tensor] = None,
        on_code: Optional[CodeCallback] = None,
    ) -> Tensor:
        given = check_given_codes(self.model, text, image_codes)
        if self.on_device and given.shape[1] < self.model.image_seq_len:
            shape = len(text), self.model.image_seq_len, self.model.num_image_tokens
            noise = gumbel_noise(*shape, generator, text.device)
            inputs = (text, noise, given) if given.shape[1] else (text, noise)
            executor = self.compiled_loop(sampling, inputs, given.shape[1])
            if executor is not None:  # it does not call on_code
                return self.run(executor, inputs).long()
        return sample_codes(self.model, text, self.stepper, sampling, generator, given, on_code)

    def compiled_loop(self, sampling: Sampling, inputs: Tuple[Tensor, ...], count: int) -> Optional[Any]:
        """Return the executor for these settings and `count` given codes, or None if it does not compile."""
        if (sampling, count) not in self.loops:
            executor = self.program(StaticSampler(self.model, sampling, **(self.on_device or {})))
            try:
                executor.compile(*(full(x[: self.rows], self.rows) for x in inputs))
            except ValueError as error:
                logger.warning("each code takes one call, because the loop over codes cannot be used: %s", error)
                self.on_device = executor = None
            self.loops[sampling, count] = executor
        return self.loops[sampling, count]

    def run(self, executor: Any, inputs: Tuple[Tensor, ...], *others: Tensor) -> Tensor:
        """Split tensors of any number of rows into calls of self.rows; pass `others` as they are to every call."""
        parts = zip(*(x.split(self.rows) for x in inputs))
        done = [executor(*(full(x, self.rows) for x in part), *others)[: len(part[0])] for part in parts]
        return torch.cat(done)


class FullPassStepper:
    """A Stepper that computes the whole sequence on the device for every code."""

    windows: Sequence[int] = (1,)

    def __init__(self, sampler: DeviceSampler):
        self.sampler, self.executor = sampler, None
        self.seconds: Dict[int, Dict[int, float]] = {}

    def begin(self, text: Tensor, codes: Tensor) -> Tensor:
        if self.executor is None:
            self.executor = self.sampler.program(FullPass(self.sampler.model))
        self.text, self.codes = text, codes
        place = codes.shape[1]
        codes = F.pad(codes, (0, self.sampler.model.image_seq_len - place))
        return self.sampler.run(self.executor, (text, codes), torch.tensor([place]))

    def next(self, codes: Tensor, places: Tensor) -> Tensor:
        return self.begin(self.text, torch.cat((self.codes, codes), dim=1))[:, None]


class OrderedSamples(Dataset):
    """The samples of a run in order, as a picklable dataset with a length, which PopTorch's loader needs."""

    def __init__(self, dataset: Any, order: Sequence[List[Any]], samples_per_step: int):
        self.dataset, self.order, self.samples_per_step = dataset, order, samples_per_step
        self.step = -1
        self.keys: List[Any] = []

    def __len__(self) -> int:
        """Return the number of samples of all steps."""
        return len(self.order) * self.samples_per_step

    def __getitem__(self, index: int) -> Any:
        """Read a sample; a smaller batch, in evaluation, repeats its samples."""
        step, place = divmod(index, self.samples_per_step)
        if step != self.step:
            self.step, self.keys = step, self.order[step] or self.order[0]
        return self.dataset[self.keys[place % len(self.keys)]]
