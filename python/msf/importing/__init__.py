"""Released weights of DiT, SiT, LightningDiT, REPA and diffusers as an MSF of one stage (N = 0)."""

from .importer import FORMATS, import_checkpoint

__all__ = ["FORMATS", "import_checkpoint"]
