"""PNG and JPEG files without what their pixels do not need."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
# By name, as a damaged name must not make of pixels or a palette what can be left out.
CHUNKS = {
    *(b"iCCP", b"cICP", b"sRGB", b"gAMA", b"cHRM", b"sBIT", b"mDCV", b"cLLI"),
    *(b"zTXt", b"iTXt", b"tEXt", b"tIME", b"pHYs", b"bKGD", b"hIST", b"sPLT"),
    *(b"eXIf", b"acTL", b"fcTL", b"fdAT", b"caBX", b"iDOT", b"caNv", b"orNT", b"vpAg"),
    *(b"oFFs", b"pCAL", b"sCAL", b"sTER", b"dSIG", b"fRAc", b"gIFg", b"gIFt", b"gIFx"),
}
# Segments APP0 to APP15 and comments. APP0 and APP14 say what the colours are; where they are
# shorter than this, decoders pay no attention to them.
SEGMENTS, COMMENT = range(0xE0, 0xF0), 0xFE
COLOURS = {0xE0: 14, 0xEE: 12}
START_OF_PIXELS, FILL = 0xDA, 0xFF


def without_metadata(content: bytes) -> bytes:
    """Return a PNG or JPEG file with its pixels, what their colours depend on and EXIF, which has
    the orientation, unless its checksum is wrong; anything else as it is."""
    if content.startswith(PNG):
        return PNG + b"".join(_chunks(content))
    if content.startswith(JPEG):
        return JPEG + b"".join(_segments(content))
    return content


def _chunks(content: bytes) -> Iterator[bytes]:
    at = len(PNG)
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        chunk, at = content[at:end], end
        name = chunk[4:8]
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if name not in CHUNKS or (name == b"eXIf" and whole):
            yield chunk


def _segments(content: bytes) -> Iterator[bytes]:
    at = len(JPEG)
    while content[at : at + 1] == b"\xff":
        marker = int.from_bytes(content[at + 1 : at + 2], "big")
        if marker == FILL:
            at += 1
            continue
        if marker == START_OF_PIXELS:
            break
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        segment, at = content[at:end], max(end, at + 4)
        data = segment[4:]
        if marker in COLOURS:
            kept = len(data) >= COLOURS[marker]
        else:
            kept = marker not in (*SEGMENTS, COMMENT) or data.startswith(b"Exif\0\0")
        if kept:
            yield segment
    yield content[at:]
