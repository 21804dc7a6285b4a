"""Drawing with a trained DALL-E: loading it, prompts, batches, ranking, previews, files. The network is models/'s."""
