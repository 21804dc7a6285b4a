"""Turn files into tensors: images, captions, tokenizers, datasets, caches and the demo set."""
