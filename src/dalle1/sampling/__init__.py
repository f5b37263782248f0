"""From logits to image tokens: `filters` (which codes stay possible), then `sampler` (the decoding loop)."""
