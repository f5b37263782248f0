"""From logits to image tokens: `filters` (which codes stay possible), then `generate` (the decoding loop)."""
