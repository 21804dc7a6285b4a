"""Generation with a trained DALL-E: loading, batches, ranking, previews and files."""
