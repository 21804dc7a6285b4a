"""DALLE: `<bos>` + text + image codes → logits of the next one, and the loss (arXiv 2102.12092).

    <bos> t₁ … t_T  c₁ … c_{L−1}     336 positions for T = 80, L = 256
     t₁  …  t_T c₁  …    c_L         what each predicts

The sampling loop is sampling.py's; where the layers are placed, and in which precision they run, is the backends'.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models.transformer import Transformer


class Losses(NamedTuple):
    """Scalars. `total` = (text + w·image) / (1 + w), the one to differentiate; the others are means over their own
    labels.
    """

    total: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor


class AxialPositions(nn.Module):
    """A learned vector a row plus one a column of the code grid."""

    def __init__(self, dim, fmap_size):
        super().__init__()
        self.weights_0 = nn.Parameter(torch.randn(1, fmap_size, 1, dim))
        self.weights_1 = nn.Parameter(torch.randn(1, 1, fmap_size, dim))

    def forward(self):
        return (self.weights_0 + self.weights_1).flatten(1, 2)  # (1, L, dim)


class Head(nn.Sequential):
    """Norm and projection to a stretch of the vocabulary: x (B, n, dim), tokens a slice → (B, n, len(tokens)).

    Text positions want text logits and image positions image logits, so that most of the product is never needed.
    """

    linear = staticmethod(F.linear)  # an IPU puts one in its place that computes the same in pieces

    def __init__(self, dim, num_tokens):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, num_tokens))

    def forward(self, x, tokens=slice(None)):
        norm, projection = self
        return self.linear(norm(x), projection.weight[tokens], projection.bias[tokens])


def compute_losses(dalle: "DALLE", x: torch.Tensor, text: torch.Tensor, codes: torch.Tensor) -> Losses:
    """Compute the cross-entropies of x (B, N, dim) against numbered text (B, T) and codes (B, L), in fp32.

    Each position is compared with its own vocabulary only. A masked logit adds exp(lowest) = 0 to a softmax, so this
    equals the loss over masked_logits and saves most of the head's work.
    """
    text_logits = dalle.text_logits(x[:, : dalle.text_seq_len])  # (B, T, num_text_tokens)
    image_logits = dalle.image_logits(x[:, dalle.text_seq_len :])  # (B, L, num_image_tokens)
    text_loss = F.cross_entropy(text_logits.flatten(0, 1).float(), text.flatten())
    image_loss = F.cross_entropy(image_logits.flatten(0, 1).float(), codes.flatten())
    weight = dalle.loss_img_weight
    return Losses((text_loss + weight * image_loss) / (1 + weight), text_loss, image_loss)


class DALLE(nn.Module):
    """The transformer with its embeddings and head, and the frozen VQGAN that turns pixels into codes.

    vae: an image tokenizer with image_size, num_layers (halvings of the side) and num_tokens (codes); where pixels are
    given, a call of it turns them into codes. num_text_tokens does not count the padding ids: a padding token
    (0) at position p becomes the id num_text_tokens + p, so each padding position has a token of its own. The attribute
    self.num_text_tokens counts both.

    Attributes:
        compute_losses: called as compute_losses(dalle, x, text, codes). The default is the function of this name;
            backends/native/fast_layers.py sets a faster equivalent on the instance that trains.
    """

    compute_losses = staticmethod(compute_losses)

    def __init__(
        self,
        *,
        dim,
        vae,
        num_text_tokens=10000,
        text_seq_len=256,
        depth,
        heads=8,
        dim_head=64,
        attn_dropout=0.0,
        ff_dropout=0.0,
        attn_types=("full",),
        loss_img_weight=7,
        sandwich_norm=False,
    ):
        super().__init__()
        self.fmap_size = vae.image_size // 2**vae.num_layers
        self.text_seq_len = text_seq_len
        self.image_seq_len = self.fmap_size**2
        self.num_text_tokens = num_text_tokens + text_seq_len
        self.num_image_tokens = vae.num_tokens
        self.loss_img_weight = loss_img_weight

        self.vae = vae
        if isinstance(vae, nn.Module):
            vae.requires_grad_(False)
        self.text_emb = nn.Embedding(self.num_text_tokens, dim)
        self.image_emb = nn.Embedding(self.num_image_tokens, dim)
        self.text_pos_emb = nn.Embedding(text_seq_len + 1, dim)
        self.image_pos_emb = AxialPositions(dim, self.fmap_size)
        self.transformer = Transformer(
            dim=dim,
            depth=depth,
            heads=heads,
            dim_head=dim_head,
            text_len=text_seq_len + 1,
            fmap_size=self.fmap_size,
            attn_types=attn_types,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            sandwich_norm=sandwich_norm,
        )
        self.to_logits = Head(dim, self.num_text_tokens + self.num_image_tokens)

        # Which logits a position may not have: codes at text positions, text at image positions.
        position = torch.arange(text_seq_len + self.image_seq_len)[:, None]
        token = torch.arange(self.num_text_tokens + self.num_image_tokens)[None, :]
        self.is_image_position = (position >= text_seq_len, token >= self.num_text_tokens)

    @property
    def num_tokens(self):
        """Text, padding and image vocabulary together."""
        return self.num_text_tokens + self.num_image_tokens

    def forward(self, text, image=None, return_loss=False):
        """Logits (B, n, num_tokens), or Losses with return_loss (in train and in eval mode alike).

        text: int64 (B, text_seq_len), 0 = padding. image: codes int64 (B, up to image_seq_len); or pixels (B, 3, S,
        S), float in [0, 1] or uint8; or None for text alone. The loss wants all of the image's codes.
        """
        text = self.number_padding(text)
        codes = image
        if image is not None and image.dim() == 4:
            codes = self.encode(image)
        if return_loss and (codes is None or codes.shape[1] != self.image_seq_len):
            raise ValueError(f"the loss needs an image: {self.image_seq_len} codes or pixels")

        x = self.embed_text(text)  # (B, T + 1, dim)
        if codes is not None:
            x = torch.cat((x, self.embed_codes(codes[:, : self.image_seq_len - 1])), dim=1)  # (B, n, dim)
        x = self.transformer(x)
        return self.compute_losses(self, x, text, codes) if return_loss else self.masked_logits(x)

    def number_padding(self, text):
        """Give every padding position its own id; (B, text_seq_len) in and out."""
        if text.shape[-1] != self.text_seq_len:
            raise ValueError(f"the model reads {self.text_seq_len} text tokens, not {text.shape[-1]}")
        padding = torch.arange(self.num_text_tokens - self.text_seq_len, self.num_text_tokens, device=text.device)
        return torch.where(text == 0, padding, text)

    def encode(self, pixels):
        """Pixels (B, 3, S, S), float in [0, 1] or uint8 → codes (B, L), without a gradient."""
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        return self.vae(pixels)

    def embed_text(self, text):
        """Numbered text (B, T) → `<bos>` and text, embedded (B, T + 1, dim)."""
        text = F.pad(text, (1, 0), value=0)
        return self.text_emb(text) + self.text_pos_emb.weight[: text.shape[1]]

    def embed_codes(self, codes, start=0):
        """Codes (B, n), the first of them at place `start` of the picture → (B, n, dim)."""
        return self.image_emb(codes) + self.image_pos_emb()[:, start : start + codes.shape[1]]

    def text_logits(self, x):
        """(B, n, dim) → (B, n, num_text_tokens)."""
        return self.to_logits(x, slice(0, self.num_text_tokens))

    def image_logits(self, x):
        """(B, n, dim) → (B, n, num_image_tokens)."""
        return self.to_logits(x, slice(self.num_text_tokens, self.num_tokens))

    def masked_logits(self, x):
        """The whole vocabulary at every position, what cannot follow at the dtype's lowest value."""
        logits = self.to_logits(x)
        positions, tokens = self.is_image_position
        forbidden = (positions[: x.shape[1]] != tokens).to(x.device)
        return logits.masked_fill(forbidden, -torch.finfo(logits.dtype).max)
