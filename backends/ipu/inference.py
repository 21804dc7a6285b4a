"""Inference where shapes never change: any number of rows through a function that was compiled for a fixed number.

How a module becomes such a function is handed in (`inference(module, device_iterations)`, ipu.py's); no SDK is named
here. And samples one after the other, as a loader of fixed batches wants them.
"""

import logging

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from models.sampling import draw_codes, given_codes, gumbel_noise
from models.static_sampling import FullPass, StaticSampler

LOG = logging.getLogger("minidalle")


def full(x, rows):
    """x (n, …) with its last row repeated → (rows, …)."""
    return torch.cat((x, x[-1:].expand(rows - len(x), *x.shape[1:])))


class Decoder(nn.Module):
    """A VQGAN's way back as a module of its own: codes int (B, L) → pixels (B, 3, S, S)."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, codes):
        return self.vae.decode(codes)


class Losses(nn.Module):
    """A DALLE's losses of a row: text and codes end to end, int (1, T + L) → total, text and image, fp32 (1, 3)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, row):
        text, codes = row[:, : self.model.text_seq_len], row[:, self.model.text_seq_len :]
        return torch.stack(self.model(text, codes, return_loss=True)).float()[None]


def upper_rows(decode):
    """decode of a picture's codes (B, L) → decode(codes, rows=None), which takes those of its upper rows, too: the rest
    is filled up and cut off again, since shapes cannot change.
    """

    def decode_rows(codes, rows=None):
        if rows is None:
            return decode(codes)
        side = codes.shape[1] // rows
        pixels = decode(F.pad(codes, (0, side**2 - codes.shape[1])))
        return pixels[:, :, : pixels.shape[3] * rows // side]

    return decode_rows


class RowByRow:
    """module(x) for any number of rows: each call takes as many as the first, one after the other on the device."""

    def __init__(self, module, inference):
        self.module, self.inference = module, inference
        self.executor, self.rows = None, 0

    def __call__(self, x):
        if self.executor is None:
            self.rows = len(x)
            self.executor = self.inference(self.module, self.rows)
        return torch.cat([self.executor(full(part, self.rows))[: len(part)] for part in x.split(self.rows)])

    def destroy(self):
        if self.executor is not None:
            self.executor.destroy()
            self.executor = None


class Sampler:
    """generate_codes in calls of `rows` pictures, the last repeated where fewer are wanted.

    on_device: StaticSampler's loop and update, for one call a batch; None, or where that does not compile: one a code.
    """

    def __init__(self, model, rows, inference, on_device):
        self.model, self.rows, self.inference, self.on_device = model, rows, inference, on_device
        self.executors = {}

    def __call__(
        self,
        text,
        *,
        top_k=0.99,
        top_p=None,
        temperature=1.0,
        cond_scale=1.0,
        generator=None,
        image_codes=None,
        watch=None,
    ):
        shaping = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "cond_scale": cond_scale}
        given = given_codes(self.model, text, image_codes)
        if self.on_device and given.shape[1] < self.model.image_seq_len:
            noise = gumbel_noise(
                len(text), self.model.image_seq_len, self.model.num_image_tokens, generator, text.device
            )
            inputs = (text, noise, given) if given.shape[1] else (text, noise)
            executor = self.compiled_loop(shaping, inputs, key=(given.shape[1], *shaping.values()))
            if executor is not None:  # which cannot be watched
                return self.run(executor, inputs).long()
        return draw_codes(
            self.model, text, self.full_pass, generator=generator, image_codes=given, watch=watch, **shaping
        )

    def compiled_loop(self, shaping, inputs, key):
        """The executor of `key`, or None where it does not compile."""
        if key not in self.executors:
            executor = self.inference(StaticSampler(self.model, **self.on_device, **shaping))
            try:
                executor.compile(*(full(x[: self.rows], self.rows) for x in inputs))
            except RuntimeError as error:
                LOG.warning("the loop over codes does not compile, so one call a code: %s", str(error).splitlines()[0])
                self.on_device = executor = None
            self.executors[key] = executor
        return self.executors[key]

    def full_pass(self, dalle, text, codes, cache):
        """draw_codes' logits_of: (B, V) of the code after `codes`."""
        if "full pass" not in self.executors:
            self.executors["full pass"] = self.inference(FullPass(self.model))
        place = codes.shape[1]
        codes = F.pad(codes, (0, dalle.image_seq_len - place))
        return self.run(self.executors["full pass"], (text, codes), torch.tensor([place]))

    def run(self, executor, inputs, *others):
        """Tensors of any number of rows through an executor for self.rows of them; others are passed as they are."""
        parts = zip(*(x.split(self.rows) for x in inputs))
        done = [executor(*(full(x, self.rows) for x in part), *others)[: len(part[0])] for part in parts]
        return torch.cat(done)


class OrderedSamples(Dataset):
    """The samples of a run one after the other, where the order's keys are those of steps: picklable, with a length,
    as PopTorch's loader wants it.
    """

    def __init__(self, dataset, order, samples_per_step):
        self.dataset, self.order, self.samples_per_step = dataset, order, samples_per_step
        self.step, self.keys = None, []

    def __len__(self):
        return len(self.order) * self.samples_per_step

    def __getitem__(self, index):
        step, place = divmod(index, self.samples_per_step)
        if step != self.step:
            self.step, self.keys = step, self.order[step] or self.order[0]
        return self.dataset[self.keys[place % len(self.keys)]]  # a small batch, in evaluation, is filled up
