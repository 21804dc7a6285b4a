"""How well a picture's codes and a caption go together, by the DALL-E itself; no sampling, no pixels.

The model reads a caption first and codes after it, so p(codes | caption) is exact in one pass, and by Bayes' rule
log p(caption | codes) = log p(codes | caption) − log p(codes) + log p(caption). For pictures of one caption the last
term is the same, so that the first two rank them. p(codes) is what the model says to an empty caption, which it has
learnt only with caption dropout, and less well: pictures that it finds odd without a caption, because they are, would
win. So p(codes) counts for a part only, which is the same as to rank by a mean of log p(caption | codes) and
log p(codes | caption).
"""

import torch
from torch.nn import functional as F

CONTRAST = (
    0.25  # of 0, 0.25, 0.5, 0.75 and 1 the best for the demo's captions of --prompt-set choose, best of 2, 4 and 8
)


@torch.no_grad()
def log_likelihood(dalle, text, codes):
    """log p(codes | text), in nats: text int64 (B, text_seq_len), codes int64 (B, L) → fp32 (B,)."""
    x = torch.cat((dalle.embed_text(dalle.number_padding(text)), dalle.embed_codes(codes[:, :-1])), dim=1)
    x = dalle.transformer(x)  # (B, T + L, dim)
    logits = dalle.image_logits(x[:, dalle.text_seq_len :]).float()  # (B, L, V)
    return -F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").sum(dim=1)


def caption_score(dalle, text, codes, contrast=CONTRAST):
    """contrast · log p(text | codes) + (1 − contrast) · log p(codes | text), but for what is the same for all pictures
    of a text: fp32 (B,), in nats.

    contrast 0, for a model that was not trained without captions, is log p(codes | text) alone, which prefers plain
    pictures.
    """
    told = log_likelihood(dalle, text, codes)
    return told - contrast * log_likelihood(dalle, torch.zeros_like(text), codes) if contrast else told
