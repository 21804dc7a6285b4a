"""Train a VQGAN step by step, start and revive its codebook, and evaluate it.

Papers: VQGAN, Esser et al. 2021 (arXiv:2012.09841); k-means++, Arthur and Vassilvitskii 2007; entropy-constrained
quantization, Chou, Lookabaugh and Gray 1989.
"""

import contextlib
import math
from typing import Any, ContextManager, Dict, List, NamedTuple, Optional

import torch
import torch.nn.functional as F
from einops import rearrange
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

from models.vae import VQGan

DISC_RATE = 1e-4  # the discriminator's learning rate; a higher one lets it win too early
USAGE_DECAY = 0.97  # per step, of the moving count of each code's uses
SEED_CELLS = 32768  # cells that the codebook is initialized from
SEED_SIDE = 8  # pixels per side that cells are reduced to for clustering
REVIVAL_ENDS = 0.75  # of the run; a code that is revived later would not settle


class VQGanTrainer:
    """The training of a VQGAN with reconstruction, codebook and, from disc_start on, adversarial loss.

    Without quantization at first; `start_codebook` ends that. `settings` has learning_rate, codebook_weight,
    commitment, edge_weight, rate_weight, decoder_of, revival_interval, disc_weight, disc_start, batch_size and
    max_steps, as train_vqgan.py's flags explain them.

    Args:
        model: on `device` already.
        optimizers: over the parameters to train, with decoder_of the decoder's alone; each step sets their rates.
        autocast: dtype in which encoder, decoder and discriminator run; None: that of the parameters.
    """

    def __init__(
        self,
        model: VQGan,
        optimizers: List[torch.optim.Optimizer],
        settings: Any,
        device: torch.device,
        autocast: Optional[torch.dtype] = None,
    ):
        self.model = model.train()
        self.optimizers = optimizers
        self.settings = settings
        self.device = device
        self.autocast = autocast
        self.steps = 0
        self.has_codebook = False
        self.usage = torch.ones(len(model.codebook), device=device)  # recent uses of each code
        self.last_use = torch.zeros(len(model.codebook), dtype=torch.long, device=device)  # step of the latest one
        self.discriminator: Any = None
        if settings.disc_weight:
            self.discriminator = NLayerDiscriminator().apply(weights_init).to(device)
            self.disc_optimizer = torch.optim.Adam(self.discriminator.parameters(), DISC_RATE, betas=(0.5, 0.9))

    def _all_optimizers(self) -> List[torch.optim.Optimizer]:
        return self.optimizers + ([self.disc_optimizer] if self.discriminator is not None else [])

    def state_dict(self) -> Dict[str, Any]:
        """Return what a resumed run needs besides the model's weights and the settings: tensors and plain values."""
        state = {name: getattr(self, name) for name in ("steps", "has_codebook", "usage", "last_use")}
        state["random_state"] = torch.get_rng_state()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self._all_optimizers()]
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
        return state

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for a trainer of the same settings."""
        for optimizer, saved in zip(self._all_optimizers(), state["optimizers"]):
            optimizer.load_state_dict(saved)
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
        torch.set_rng_state(state["random_state"].cpu())
        for name in ("steps", "has_codebook", "usage", "last_use"):
            setattr(self, name, state[name])

    def autocast_context(self) -> ContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type=self.device.type, dtype=self.autocast)

    def step(self, images: torch.Tensor, share_of_rate: float) -> Dict[str, torch.Tensor]:
        """Make one update from (B, 3, H, W) uint8 images, at this share of the peak learning rate.

        Returns 0-dim tensors: loss, and mse (of pixels in [0, 1]).
        """
        for optimizer in self._all_optimizers():
            rate = self.settings.learning_rate if optimizer in self.optimizers else DISC_RATE
            for group in optimizer.param_groups:
                group["lr"] = rate * share_of_rate
        pixels = to_pixels(images.to(self.device))
        with self.autocast_context(), torch.set_grad_enabled(not self.settings.decoder_of):
            latents = self.model.encode(pixels)
        latents = latents.float()  # (B, D, h, w)
        codebook_loss = latents.new_zeros(())
        quantized = latents
        if self.settings.decoder_of:
            quantized = self.model.lookup(self.model.nearest(latents)).detach()
        elif self.has_codebook:
            entries = self.model.lookup(self._choose(latents.detach()))
            codebook_loss = F.mse_loss(entries, latents.detach())
            codebook_loss = codebook_loss + self.settings.commitment * F.mse_loss(latents, entries.detach())
            quantized = latents + (entries - latents).detach()  # the gradient passes straight through
        with self.autocast_context():
            decoded = self.model.decode(quantized)
        decoded = decoded.float()
        mse = F.mse_loss(decoded.detach(), pixels)
        reconstruction = reconstruction_loss(decoded, pixels, self.settings.edge_weight)
        loss = reconstruction + self.settings.codebook_weight * codebook_loss

        adversarial = self.discriminator is not None and self.steps >= self.settings.disc_start
        if adversarial:
            loss = loss + self._generator_loss(reconstruction, decoded)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if adversarial:
            self._train_discriminator(pixels, decoded.detach())

        self.steps += 1
        interval = self.settings.revival_interval
        reviving = interval and self.steps % interval == 0 and self.steps < REVIVAL_ENDS * self.settings.max_steps
        if self.has_codebook and reviving and not self.settings.decoder_of:
            self._revive(latents.detach(), (decoded.detach() - pixels).square().mean(dim=1, keepdim=True))
        return {"loss": loss.detach(), "mse": mse / 4}

    @torch.no_grad()
    def _choose(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the codes (B, h, w) of latents (B, D, h, w); `rate_weight` favors codes in frequent use.

        A code's handicap is its −log2 frequency in bits, times rate_weight and the latents' variance.
        Without it, a plain background gets dozens of codes that look the same, and the transformer has to learn which
        of them comes where.
        """
        handicap = None
        if self.settings.rate_weight:
            bits = -((self.usage + 0.5) / (self.usage + 0.5).sum()).log2()
            variance = rearrange(latents, "b d h w -> (b h w) d").var(dim=0).sum()
            handicap = self.settings.rate_weight * variance * bits
        codes = self.model.nearest(latents, handicap)
        used = torch.bincount(codes.flatten(), minlength=len(self.usage))
        self.usage.mul_(USAGE_DECAY).add_(used)
        self.last_use[used > 0] = self.steps
        return codes

    @torch.no_grad()
    def _revive(self, latents: torch.Tensor, squared_error: torch.Tensor) -> None:
        """Move codes that were not used recently to latents of badly reconstructed cells."""
        dead = (self.last_use < self.steps - self.settings.revival_interval).nonzero().flatten()
        if len(dead) == 0:
            return
        flat = rearrange(latents, "b d h w -> (b h w) d")
        height, width = latents.shape[-2:]
        weights = F.adaptive_avg_pool2d(squared_error, (height, width)).flatten() + 1e-12  # (B * h * w,)
        # On the CPU, because its random state is the one that a checkpoint has.
        chosen = torch.multinomial(weights.cpu(), len(dead), replacement=len(dead) > len(flat)).to(flat.device)
        self.model.codebook[dead] = flat[chosen]
        self.usage[dead] = self.usage.mean()
        self.last_use[dead] = self.steps

    @torch.no_grad()
    def start_codebook(self, images: torch.Tensor) -> int:
        """Start to quantize with a codebook made from uint8 images (N, 3, H, W); return the number of entries in use.

        The cells are clustered by their pixels, with k-means++ seeds, and an entry is the mean latent of a cluster.
        Clusters of latents would spend most entries on the neighborhoods of the most frequent cell, because the latents
        of an encoder without quantization depend on the surroundings of a cell.
        """
        latents, cells = [], []
        for batch in images.split(self.settings.batch_size):
            pixels = to_pixels(batch.to(self.device))
            with self.autocast_context():
                encoded = self.model.encode(pixels).float()
            side = encoded.shape[-1]
            latents.append(rearrange(encoded, "b d h w -> (b h w) d"))
            small = F.adaptive_avg_pool2d(pixels, side * min(SEED_SIDE, pixels.shape[-1] // side))
            cells.append(rearrange(small, "b c (h p) (w q) -> (b h w) (c p q)", h=side, w=side))
        points, looks = torch.cat(latents), torch.cat(cells)
        seeds = looks[_seed_indices(looks, len(self.usage))]  # (K, c * p * q)
        nearest = torch.cat([torch.cdist(part, seeds).argmin(dim=1) for part in looks.split(4096)])
        counts = torch.bincount(nearest, minlength=len(seeds))
        means = torch.zeros(len(seeds), points.shape[1], device=self.device).index_add_(0, nearest, points)
        # Unused entries are moved out of reach; copies of other entries would be chosen.
        self.model.codebook[:] = 100 * points.abs().max()
        self.model.codebook[: len(seeds)] = means / counts.clamp(min=1)[:, None]
        self.usage.zero_()
        self.usage[: len(seeds)] = counts * (self.settings.batch_size / len(images))
        self.last_use[:] = self.steps
        self.has_codebook = True
        return len(seeds)

    def _generator_loss(self, reconstruction: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Return the adversarial loss, scaled so that its gradient at the last layer matches the reconstruction's."""
        with self.autocast_context():
            opinion = -self.discriminator(decoded).float().mean()
        last = self.model.decoder.conv_out.weight
        of_pixels = torch.autograd.grad(reconstruction, last, retain_graph=True)[0].norm()
        of_opinion = torch.autograd.grad(opinion, last, retain_graph=True)[0].norm()
        balance = (of_pixels / (of_opinion + 1e-4)).clamp(max=1e4)
        return self.settings.disc_weight * balance.detach() * opinion

    def _train_discriminator(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        with self.autocast_context():
            on_real, on_fake = self.discriminator(real).float(), self.discriminator(fake).float()
        loss = 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())  # hinge
        self.disc_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.disc_optimizer.step()


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor, edge_weight: float) -> torch.Tensor:
    """Return the squared error of (B, 3, H, W) images in [-1, 1], with larger weights at the original's edges.

    A pixel's weight is 1 + edge_weight × contrast, the range of brightness in its 3 × 3 neighborhood in [0, 1]; the
    weights of a batch are then scaled to a mean of 1. Thin lines, a few percent of the pixels of a drawing, would
    otherwise be blurred.
    """
    if not edge_weight:
        return F.mse_loss(decoded, pixels)
    brightness = pixels.mean(dim=1, keepdim=True)
    brightest = F.max_pool2d(brightness, 3, stride=1, padding=1)
    darkest = -F.max_pool2d(-brightness, 3, stride=1, padding=1)
    weights = 1 + edge_weight * (brightest - darkest) / 2
    return (weights / weights.mean() * (decoded - pixels).square()).mean()


def _seed_indices(points: torch.Tensor, count: int) -> torch.Tensor:
    """Return up to `count` indices into points (N, F) by k-means++; fewer if there are not as many different points.

    The probability of a point is proportional to its squared distance from the nearest of the points before it.
    """
    squares = points.square().sum(dim=1)

    def distance_to(index: int) -> torch.Tensor:  # squared; as a product, it needs no copy of all points
        return (squares + squares[index] - 2 * (points @ points[index])).clamp(min=0)

    chosen = [int(torch.randint(len(points), (1,)))]
    distance = distance_to(chosen[0])
    while len(chosen) < count and distance.max() > 1e-3:
        chosen.append(int(torch.multinomial(distance, 1)))
        distance = torch.minimum(distance, distance_to(chosen[-1]))
    return torch.tensor(chosen, device=points.device)


class Evaluation(NamedTuple):
    """How well a VQGAN reconstructs images."""

    psnr: float  # dB, mean over images
    codes_used: int
    perplexity: float  # 2 to the power of the codes' entropy in bits: the number of codes in even use
    reconstructions: torch.Tensor  # (N, 3, H, W) uint8, of the first images


@torch.no_grad()
def evaluate(model: VQGan, images: torch.Tensor, batch_size: int, keep: int = 8) -> Evaluation:
    """Encode, quantize and decode (N, 3, H, W) uint8 images in fp32."""
    training = model.training
    model.eval()
    device = model.codebook.device
    kept: List[torch.Tensor] = []
    psnr: List[torch.Tensor] = []
    counts = torch.zeros(len(model.codebook), dtype=torch.long, device=device)
    for batch in images.split(batch_size):
        codes = model.nearest(model.encode(to_pixels(batch.to(device))))
        decoded = ((model.decode(model.lookup(codes)) + 1) / 2).clamp(0, 1)
        mse = (decoded - batch.to(device).float() / 255).square().mean(dim=(1, 2, 3))
        psnr.append(-10 * mse.clamp(min=1e-10).log10())
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        if sum(map(len, kept)) < keep:
            kept.append((decoded * 255).round().byte().cpu())
    model.train(training)
    frequency = counts[counts > 0] / counts.sum()
    entropy = -(frequency * frequency.log2()).sum().item()
    return Evaluation(torch.cat(psnr).mean().item(), len(frequency), math.pow(2, entropy), torch.cat(kept)[:keep])
