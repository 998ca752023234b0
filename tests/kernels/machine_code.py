from collections.abc import Iterable


def sass(lines: Iterable[str]) -> str:
    """Instructions as nvdisasm prints them, 16 bytes each from address 0 on."""
    return "\n".join(f"        /*{16 * at:04x}*/   {line} ;" for at, line in enumerate(lines))
