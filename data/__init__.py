"""Files to tensors: captions, tokenizers, the loader, the code cache and the demo set."""
