"""From bytes and words to embeddings: decoding, CLIP through open_clip, prompts, nouns."""
