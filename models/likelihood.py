"""How well a picture's codes and a caption go together, by the DALL-E itself; no sampling, no pixels.

The model reads a caption first and codes after it, so p(codes | caption) is exact in one pass, and by Bayes' rule
log p(caption | codes) = log p(codes | caption) − log p(codes) + log p(caption). For pictures of one caption the last
term is the same, so that the first two rank them. p(codes) is what the model says to an empty caption, which it has
learnt only with caption dropout.
"""

import torch
from torch.nn import functional as F


@torch.no_grad()
def log_likelihood(dalle, text, codes):
    """log p(codes | text), in nats: text int64 (B, text_seq_len), codes int64 (B, L) → fp32 (B,)."""
    x = torch.cat((dalle.embed_text(dalle.number_padding(text)), dalle.embed_codes(codes[:, :-1])), dim=1)
    x = dalle.transformer(x)  # (B, T + L, dim)
    logits = dalle.image_logits(x[:, dalle.text_seq_len :]).float()  # (B, L, V)
    return -F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").sum(dim=1)


def caption_score(dalle, text, codes, contrast=True):
    """log p(codes | text) − log p(codes | no text), fp32 (B,): by how much the caption explains the picture.

    contrast False, for a model that was not trained without captions: log p(codes | text) alone, which prefers plain
    pictures.
    """
    told = log_likelihood(dalle, text, codes)
    return told - log_likelihood(dalle, torch.zeros_like(text), codes) if contrast else told
