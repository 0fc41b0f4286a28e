"""A file a family of decoders: what its config.json means, and where its tensors lie. No arrays."""
