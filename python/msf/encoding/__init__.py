"""Images become latents, once, before training: what ``msf encode`` does."""
