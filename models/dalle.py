"""The DALLE model: it reads `<bos>`, text and image codes, and predicts the next token or code (arXiv 2102.12092).

<bos> t₁ … t_T  c₁ … c_{L−1}     336 positions for T = 80, L = 256
 t₁  …  t_T c₁  …    c_L         what each position predicts
"""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.transformer import Transformer


class Losses(NamedTuple):
    """Scalar losses in nats: means over text and image labels, and total = (text + w·image) / (1 + w) to train on."""

    total: Tensor
    text: Tensor
    image: Tensor


class AxialPositions(nn.Module):
    """A trained vector for each row of the code grid, plus one for each column."""

    def __init__(self, dim: int, fmap_size: int):
        super().__init__()
        self.weights_0 = nn.Parameter(torch.randn(1, fmap_size, 1, dim))
        self.weights_1 = nn.Parameter(torch.randn(1, 1, fmap_size, dim))

    def forward(self) -> Tensor:
        """Return the vectors of all places, (1, L, dim)."""
        return (self.weights_0 + self.weights_1).flatten(1, 2)


class Head(nn.Sequential):
    """Norm and projection to the vocabulary, or to a part of it.

    Text positions need text logits and image positions need image logits, so most of the product is never needed.

    Attributes:
        linear: computes the projection; the default is F.linear. models/pipeline_dalle.py sets one that computes it in
            pieces, to fit an IPU's memory.
    """

    linear: Callable[..., Tensor] = staticmethod(F.linear)

    def __init__(self, dim: int, num_tokens: int):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, num_tokens))

    @property
    def norm_and_projection(self) -> Tuple[Any, Any]:
        """The nn.LayerNorm and the nn.Linear."""
        return self[0], self[1]

    def forward(self, x: Tensor, tokens: slice = slice(None)) -> Tensor:
        """Map x (B, n, dim) to logits (B, n, len(tokens))."""
        norm, projection = self.norm_and_projection
        return self.linear(norm(x), projection.weight[tokens], projection.bias[tokens])


def compute_losses(dalle: "DALLE", x: Tensor, text: Tensor, codes: Tensor) -> Losses:
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
    """The transformer with its embeddings and head, and the frozen VQGAN that encodes pixels.

    Args:
        vae: an image tokenizer with image_size, num_layers (halvings of the side) and num_tokens (codes). Calling it
            with pixels returns codes.
        num_text_tokens: size of the text vocabulary, without padding ids.
        rotary_emb: rotate keys by their positions, in place of trained vectors for positions.
        options: see Transformer; all are dalle-pytorch's.

    Attributes:
        num_text_tokens: size of the text vocabulary, with padding ids.
        first_padding_id: what padding (0) at position 0 becomes; at position p it becomes first_padding_id + p.
        compute_losses: called as compute_losses(dalle, x, text, codes). The default is the function of this name;
            backends/native/fast_layers.py sets a faster equivalent on the instance that trains.
    """

    compute_losses = staticmethod(compute_losses)

    def __init__(
        self,
        *,
        dim: int,
        vae: Any,
        num_text_tokens: int = 10000,
        text_seq_len: int = 256,
        loss_img_weight: float = 7,
        rotary_emb: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.fmap_size = vae.image_size // 2**vae.num_layers
        self.text_seq_len = text_seq_len
        self.image_seq_len = self.fmap_size**2
        self.first_padding_id = num_text_tokens
        self.num_text_tokens = num_text_tokens + text_seq_len
        self.num_image_tokens = vae.num_tokens
        self.loss_img_weight = loss_img_weight

        self.vae = vae
        if isinstance(vae, nn.Module):
            vae.requires_grad_(False)
        self.text_emb: Any = nn.Embedding(self.num_text_tokens, dim)
        self.image_emb = nn.Embedding(self.num_image_tokens, dim)
        self.text_pos_emb = None if rotary_emb else nn.Embedding(text_seq_len + 1, dim)
        self.image_pos_emb: Any = None if rotary_emb else AxialPositions(dim, self.fmap_size)
        sizes = {"dim": dim, "text_len": text_seq_len + 1, "fmap_size": self.fmap_size}
        self.transformer = Transformer(**sizes, rotary_emb=rotary_emb, **options)
        self.to_logits = Head(dim, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """Number of text tokens, padding ids and image codes together."""
        return self.num_text_tokens + self.num_image_tokens

    def forward(self, text: Tensor, image: Optional[Tensor] = None, return_loss: bool = False) -> Union[Tensor, Losses]:
        """Compute logits (B, n, num_tokens), or Losses if return_loss is set.

        Args:
            text: int64 (B, text_seq_len), 0 = padding.
            image: codes int64 (B, n), n ≤ image_seq_len; or pixels (B, 3, S, S), float in [0, 1] or uint8; or None. The
                loss needs all codes.
        """
        text = self.number_padding(text)
        codes = image
        if image is not None and image.dim() == 4:
            codes = self.vae(image.float() / 255 if image.dtype == torch.uint8 else image)
        x = self.embed_text(text)  # (B, T + 1, dim)
        if codes is not None:
            x = torch.cat((x, self.embed_codes(codes[:, : self.image_seq_len - 1])), dim=1)  # (B, n, dim)
        if not return_loss:
            return self.masked_logits(self.transformer(x))
        if codes is None or codes.shape[1] != self.image_seq_len:
            raise ValueError(f"the loss needs an image: {self.image_seq_len} codes or pixels")
        return self.compute_losses(self, self.transformer(x), text, codes)

    def number_padding(self, text: Tensor) -> Tensor:
        """Replace padding by the id of its position; (B, text_seq_len) in and out."""
        if text.shape[-1] != self.text_seq_len:
            raise ValueError(f"the model reads {self.text_seq_len} text tokens, not {text.shape[-1]}")
        padding = torch.arange(self.first_padding_id, self.num_text_tokens, device=text.device)
        return torch.where(text == 0, padding, text)

    def embed_text(self, text: Tensor) -> Tensor:
        """Embed `<bos>` and numbered text (B, T) as (B, T + 1, dim)."""
        x = self.text_emb(F.pad(text, (1, 0), value=0))
        return x if self.text_pos_emb is None else x + self.text_pos_emb.weight[: x.shape[1]]

    def embed_codes(self, codes: Tensor, start: int = 0) -> Tensor:
        """Embed codes (B, n), the first of them at place `start` of the image, as (B, n, dim)."""
        x = self.image_emb(codes)
        return x if self.image_pos_emb is None else x + self.image_pos_emb()[:, start : start + x.shape[1]]

    def text_logits(self, x: Tensor) -> Tensor:
        """Map x (B, n, dim) to logits (B, n, num_text_tokens)."""
        return self.to_logits(x, slice(0, self.num_text_tokens))

    def image_logits(self, x: Tensor) -> Tensor:
        """Map x (B, n, dim) to logits (B, n, num_image_tokens)."""
        return self.to_logits(x, slice(self.num_text_tokens, self.num_tokens))

    def masked_logits(self, x: Tensor) -> Tensor:
        """Compute logits (B, n, num_tokens) of x (B, n, dim); impossible tokens get the dtype's lowest value."""
        logits = self.to_logits(x)
        # A code never follows a text position, nor text an image position.
        before_code = torch.arange(x.shape[1], device=x.device)[:, None] >= self.text_seq_len
        is_code = torch.arange(self.num_tokens, device=x.device) >= self.num_text_tokens
        return logits.masked_fill(before_code != is_code, -torch.finfo(logits.dtype).max)


def parameter_groups(model: nn.Module, weight_decay: float) -> List[Dict[str, Any]]:
    """Return the trainable parameters as two groups for torch: matrices with weight_decay, all others without.

    LayerScale (1, 1, dim) and the axial positions (1, H, 1, dim) count as vectors. The order within a group is that of
    model.parameters().
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() == 2]
    others = [parameter for parameter in trained if parameter.dim() != 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
