"""Run models with fixed shapes: any number of rows through a program that was compiled for a fixed number.

The backend passes a function that returns Programs; this file names no SDK.
"""

import contextlib
import copy
import logging
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from data.loader import (
    BROKEN_PIPE,
    MEMORY_ADVICE,
    SamplesLost,
    explain_dead_worker,
    last_line,
    notice_dead_worker,
)
from models.dalle import DALLE
from models.pipeline_dalle import unshare_masks
from models.sampling import CodeCallback, Generators, Sampling, check_given_codes, gumbel_noise
from models.static_sampling import FullPass, StaticSampler, settings_row
from models.vae import ImageTokenizer

logger = logging.getLogger("minidalle")


def full(x: Tensor, rows: int) -> Tensor:
    """Repeat the last row of x (n, …) so that there are `rows`."""
    return torch.cat((x, x[-1:].expand(rows - len(x), *x.shape[1:])))


def inference_copy(model: DALLE, size: int) -> DALLE:
    """Return a copy of a DALLE for one IPU: without its VQGAN, in numbers of 2 or 4 bytes."""
    logger.info("running on an IPU in %s", "fp16" if size == 2 else "fp32")
    model = copy.deepcopy(model, {id(model.vae): None}).eval()
    unshare_masks(model)
    return model.half() if size == 2 else model


class VqganDecoder(nn.Module):
    """A VQGAN's decoder as a module, from codes int (B, L) to pixels (B, 3, S, S)."""

    def __init__(self, vae: ImageTokenizer):
        super().__init__()
        self.vae = vae

    def forward(self, codes: Tensor) -> Tensor:
        return self.vae.decode(codes)


class DeviceLosses(nn.Module):
    """A DALLE's losses of one row, int (1, T + L) of text and codes: total, text and image loss, fp32 (1, 3)."""

    def __init__(self, model: DALLE):
        super().__init__()
        self.model = model

    def forward(self, row: Tensor) -> Tensor:
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


class CompileError(ValueError):
    """A module does not compile for an IPU, or there is no free IPU; the message is one line."""


class Program:
    """A module that is compiled at its first call, and holds IPUs from then on until `release`.

    Args:
        make: returns a new executor of PopTorch.
        role: what the module does, for messages.
        slot: of all programs with the same slot, only the one called last holds IPUs, and is in `holders`.
        errors: returns a context that turns PopTorch's errors into ValueError, or into another class.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        role: str,
        slot: str,
        holders: Dict[str, "Program"],
        errors: Callable[..., ContextManager[Any]],
    ):
        self.make, self.role, self.slot, self.holders, self.errors = make, role, slot, holders, errors
        self.executor: Any = None

    def compile(self, *inputs: Tensor) -> None:
        """Compile for inputs like these unless that is done, and take the IPUs; CompileError if it cannot."""
        if self.holders.get(self.slot) is self:
            return
        if self.slot in self.holders:
            self.holders[self.slot].release()
        with self.errors(f"the {self.role} does not compile", CompileError):
            if self.executor is None:
                executor = self.make()
                executor.compile(*inputs)
                self.executor = executor
            else:
                self.executor.attachToDevice()
        self.holders[self.slot] = self

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.compile(*inputs)
        with self.errors(f"the {self.role} stopped"):
            return self.executor(*inputs)

    def release(self) -> None:
        """Give up the IPUs; the next call takes them again, without compiling."""
        del self.holders[self.slot]
        with self.errors(f"the {self.role} stopped"):
            self.executor.detachFromDevice()


class RowByRow:
    """A module for any number of rows: each call takes about as many as the first one had, one after another.

    Args:
        program: returns the Program of a module that takes `device_iterations` rows for each replica.
        replicas: copies of the module that share a call's rows.
    """

    def __init__(self, program: Callable[..., Program], replicas: int = 1):
        self.compile_for, self.replicas = program, replicas
        self.program: Optional[Program] = None
        self.rows = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.program is None:
            iterations = -(-len(x) // self.replicas)
            self.rows = iterations * self.replicas
            self.program = self.compile_for(device_iterations=iterations)
        return torch.cat([self.program(full(part, self.rows))[: len(part)] for part in x.split(self.rows)])


class DeviceSampler:
    """Backend.sampler in calls of `rows` sequences: as many images, or half as many guided ones.

    One program serves all settings and image prompts. If there are fewer images, the last one is repeated.

    Args:
        rows: an odd number is rounded up.
        program: returns a module's Program.
        operators: StaticSampler's loop and update. If it does not compile with them, every code takes a call.
    """

    def __init__(self, model: DALLE, rows: int, program: Callable[[nn.Module], Program], operators: Dict[str, Any]):
        self.model, self.rows = model, rows + rows % 2
        self.image_sampler, self.code_sampler = program(StaticSampler(model, **operators)), program(FullPass(model))
        self.loop_compiles = True

    def __call__(
        self,
        text: Tensor,
        sampling: Sampling = Sampling(),
        *,
        generator: Generators = None,
        image_codes: Optional[Tensor] = None,
        on_code: Optional[CodeCallback] = None,
    ) -> Tensor:
        length = self.model.image_seq_len
        codes = check_given_codes(self.model, text, image_codes)
        noise = gumbel_noise(len(text), length, self.model.num_image_tokens, generator, text.device)
        given = codes.shape[1]
        settings = settings_row(sampling, given, self.model).expand(len(text), -1)
        if given == length:
            return codes
        images = text, noise, F.pad(codes, (0, length - given)), settings
        if self.loop_compiles:
            try:
                return self.run(self.image_sampler, images, sampling.is_guided)  # it does not call on_code
            except CompileError as error:
                logger.warning("each code takes one call of the IPU, because %s", error)
                self.loop_compiles = False
        for place in range(given, length):
            index = torch.tensor([place])
            images[2][:, place : place + 1] = self.run(self.code_sampler, images, sampling.is_guided, index)
            if on_code is not None:
                on_code(images[2][:, : place + 1])
        return images[2]

    def run(self, program: Program, images: Tuple[Tensor, ...], is_guided: bool, *others: Tensor) -> Tensor:
        """Split tensors (B, …) of images into calls, with `others` as they are; return codes int64 (B, n)."""
        at_once = self.rows // 2 if is_guided else self.rows
        found = []
        for part in zip(*(tensor.split(at_once) for tensor in images)):
            text, *rest = (full(tensor, at_once) for tensor in part)
            if is_guided:
                text, rest = torch.cat((text, torch.zeros_like(text))), [torch.cat((x, x)) for x in rest]
            found.append(program(text, *rest, *others)[: len(part[0])].long())
        return torch.cat(found)


class OrderedSamples(Dataset):
    """The samples of a run in order, as a picklable dataset with a length, which PopTorch's loader needs."""

    def __init__(self, dataset: Any, order: Sequence[List[Any]], samples_per_step: int):
        self.dataset, self.order, self.samples_per_step = dataset, order, samples_per_step
        self.step = -1
        self.keys: List[Any] = []

    def __len__(self) -> int:
        return len(self.order) * self.samples_per_step

    def __getitem__(self, index: int) -> Any:
        """Read a sample; a smaller batch, in evaluation, repeats its samples."""
        step, place = divmod(index, self.samples_per_step)
        if step != self.step:
            self.step, self.keys = step, self.order[step] or self.order[0]
        return self.dataset[self.keys[place % len(self.keys)]]


@contextlib.contextmanager
def explain_loader_errors(dataset: Any, poptorch_error: Type[Exception]) -> Iterator[None]:
    """Turn what PopTorch's loader raises into SamplesLost, one line."""
    try:
        with notice_dead_worker():
            yield
    except (RuntimeError, *BROKEN_PIPE) as error:
        raise SamplesLost(explain_dead_worker(error, dataset)[0] + MEMORY_ADVICE) from None
    except (ValueError, OSError) as error:
        raise SamplesLost(last_line(error)) from None
    except (AssertionError, poptorch_error) as error:  # after the loader's process has logged the reason
        raise SamplesLost(f"samples could not be read ({error})") from None
