"""Images whose metadata is damaged, and whose pixels are not."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from msf.cli import main
from msf.data.decode import pixels
from msf.data.metadata import without_metadata

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8)
EXIF = Image.Exif()
EXIF[0x0112] = 3  # turned by 180 degrees


def saved(form, image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, form, **options)
    return file.getvalue()


def chunk(name, data, checksum=None):
    checksum = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def segment(marker, data):
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def with_chunk(added, content=None, after=33):
    """A PNG with something behind its header, or elsewhere."""
    content = content or saved("PNG")
    return content[:after] + added + content[after:]


def with_segment(added, content=None):
    content = content or saved("JPEG")
    return content[:2] + added + content[2:]


def packed(data):
    return b"x\0\0" + zlib.compress(data)


DAMAGED = {
    "iCCP without a name": with_chunk(chunk(b"iCCP", b"x" * 100)),
    "iCCP of another method": with_chunk(chunk(b"iCCP", b"x\0\7" + zlib.compress(b"abc"))),
    "iCCP with a wrong checksum": with_chunk(chunk(b"iCCP", packed(b"abc"), 5)),
    "iCCP of 5 MB": with_chunk(chunk(b"iCCP", packed(bytes(5_000_000)))),
    "zTXt of another method": with_chunk(chunk(b"zTXt", b"x\0\3abc")),
    "zTXt of 5 MB": with_chunk(chunk(b"zTXt", packed(bytes(5_000_000)))),
    "tEXt with a wrong checksum": with_chunk(chunk(b"tEXt", b"x\0abc", 5)),
    "tEXt of 66 MB": with_chunk(chunk(b"tEXt", b"x\0" + bytes(999_000)) * 66),
    "iTXt with a wrong checksum": with_chunk(chunk(b"iTXt", b"x\0\0\0\0\0abc", 5)),
    "pHYs": with_chunk(chunk(b"pHYs", b"abc")),
    "pHYs behind the pixels": with_chunk(chunk(b"pHYs", b"abc"), after=-12),
    "gAMA": with_chunk(chunk(b"gAMA", b"a")),
    "cHRM": with_chunk(chunk(b"cHRM", b"a")),
    "sRGB": with_chunk(chunk(b"sRGB", b"")),
    "eXIf with a wrong checksum": with_chunk(chunk(b"eXIf", EXIF.tobytes(), 5)),
    "caBX with a wrong checksum": with_chunk(chunk(b"caBX", b"abc", 5)),
    "iDOT with a wrong checksum": with_chunk(chunk(b"iDOT", b"abc", 5)),
    "sCAL with a wrong checksum": with_chunk(chunk(b"sCAL", b"abc", 5), after=-12),
    "acTL": with_chunk(chunk(b"acTL", b"a")),
    "APP0": with_segment(segment(0xE0, b"JFIF")),
    "APP2 of ICC": with_segment(segment(0xE2, b"ICC_PROFILE\0")),
    "APP2 of ICC behind bytes that fill": with_segment(
        b"\xff\xff" + segment(0xE2, b"ICC_PROFILE\0")
    ),
    "APP14": with_segment(segment(0xEE, b"Adobe")),
    "APP13 and a comment": with_segment(
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03")
        + segment(0xFE, b"")
        + segment(0xE0, b"JFIF")
    ),
}


def form_of(content):
    return "PNG" if content.startswith(b"\x89PNG") else "JPEG"


def read(path, content):
    path.write_bytes(content)
    return pixels(path, "RGB", lambda image: image)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_metadata_beside_readable_pixels_is_ignored(name, tmp_path):
    content = DAMAGED[name]
    whole = saved(form_of(content))
    assert torch.equal(read(tmp_path / "x", content), read(tmp_path / "y", whole))


@pytest.mark.parametrize("name", ["pHYs", "tEXt with a wrong checksum", "APP0"])
def test_damaged_pixels_beside_damaged_metadata_are_not_read(name, tmp_path):
    content = DAMAGED[name][:300]
    with pytest.raises(Exception) as error:
        read(tmp_path / "x", content)
    with pytest.raises(type(error.value)) as of_pillow, Image.open(tmp_path / "x"):
        pass
    assert str(error.value) == str(of_pillow.value)  # of the file, not of what was made of it


def test_what_colours_and_orientation_depend_on_is_kept(tmp_path):
    """A palette with transparency, the colours of CMYK, and EXIF beside what is damaged."""
    palette = Image.fromarray(PIXELS).quantize(8)
    cases = [
        (saved("PNG", palette, transparency=0), with_chunk, DAMAGED["pHYs"][33:48]),
        (saved("PNG", exif=EXIF), with_chunk, chunk(b"pHYs", b"abc")),
        (saved("JPEG", exif=EXIF), with_segment, segment(0xE2, b"ICC_PROFILE\0")),
        (
            saved("JPEG", Image.fromarray(PIXELS).convert("CMYK")),
            with_segment,
            segment(0xE2, b"ICC_PROFILE\0"),
        ),
    ]
    for whole, add, damage in cases:
        content = add(damage, whole)
        with pytest.raises(Exception), Image.open(io.BytesIO(content)) as image:  # noqa: B017
            image.load()
        assert torch.equal(read(tmp_path / "x", content), read(tmp_path / "y", whole))


def test_other_files_stay_as_they_are():
    for content in (b"", b"GIF89a", saved("TIFF"), saved("WEBP")):
        assert without_metadata(content) == content


def test_factorize_reads_them_too(tmp_path):
    (tmp_path / "x.png").write_bytes(DAMAGED["pHYs"])
    assert main(["factorize", str(tmp_path / "x.png"), "--out", str(tmp_path / "parts")]) == 0
