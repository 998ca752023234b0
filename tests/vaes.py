"""A tiny VAE of random weights, as diffusers saves one."""

import torch


def save_vae(folder, **changes):
    """Save an AutoencoderKL that makes 4x16x16 latents of 32x32 images."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    AutoencoderKL(**{**settings, **changes}).save_pretrained(folder)
    return folder
