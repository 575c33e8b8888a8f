#!/usr/bin/env python3
"""Writes the pictures of this folder and manifest.json: file forms that ../manifest.json does not have (WebP, orientation in
PNG, WebP and XMP, 16-bit alpha, colour keys, a missing end). Expected pixels are Pillow's, after
ImageOps.exif_transpose and with alpha laid over white. Made with Pillow 13.0.0 and numpy 2.4.6; run it in this folder."""
import hashlib
import io
import json
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

W, H = 44, 30
rng = np.random.default_rng(20)
entries = []


def picture(channels):
    y, x = np.mgrid[0:H, 0:W]
    planes = [128 + 90 * np.sin(x / 7 + 2 * c) + 30 * np.cos(y / 5 - c) + rng.normal(0, 6, (H, W)) for c in range(channels)]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def exif(orientation):
    e = Image.Exif()
    e[0x0112] = orientation
    e[0x010F] = "maker"
    return e.tobytes()


def expected(data):
    im = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if "A" in im.getbands() or im.info.get("transparency") is not None:
        a = np.asarray(im.convert("RGBA")).astype(int)
        return ((a[..., :3] * a[..., 3:] + 255 * (255 - a[..., 3:]) + 127) // 255).astype(np.uint8)
    return np.asarray(im.convert("RGB"))


def add(name, data):
    with open(name, "wb") as f:
        f.write(data)
    rgb = np.ascontiguousarray(expected(data))
    entries.append({"file": name, "width": rgb.shape[1], "height": rgb.shape[0], "rgb_sha256": hashlib.sha256(rgb.tobytes()).hexdigest()})


def save(name, im, **how):
    b = io.BytesIO()
    im.save(b, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.rsplit(".", 1)[1]], **how)
    add(name, b.getvalue())
    return b.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(colour_type, channels):
    a = rng.integers(0, 65536, (H, W, channels)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in a)
    header = struct.pack(">IIBBBBB", W, H, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


rgb, rgba, grey = Image.fromarray(picture(3)), Image.fromarray(picture(4)), Image.fromarray(picture(1)[..., 0])
save("lossy.webp", rgb, quality=80)
save("lossless.webp", rgb, lossless=True)
save("lossy_alpha.webp", rgba, quality=70)
save("lossless_alpha.webp", rgba, lossless=True, exact=True)
save("exif6.webp", rgb, quality=80, exif=exif(6))
save("xmp5.webp", rgb, quality=80, xmp=b'<rdf tiff:Orientation="5"/>')

save("xmp3.jpg", rgb, xmp=b"<rdf><tiff:Orientation>3</tiff:Orientation></rdf>")
save("exif8_xmp3.jpg", rgb, exif=exif(8), xmp=b'<rdf tiff:Orientation="3"/>')
save("exif_big_endian7.jpg", rgb, exif=b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 7, 0, 0))
save("exif_long2.jpg", rgb, exif=b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 4, 1, 2, 0))
save("adobe_rgb.jpg", rgb, keep_rgb=True, subsampling=0)
save("grey_progressive.jpg", grey, progressive=True)
save("cmyk_progressive.jpg", Image.fromarray(picture(4), "CMYK"), progressive=True)
save("quality_97.jpg", rgb, quality=97)

save("exif6.png", rgb, exif=exif(6))
text = PngImagePlugin.PngInfo()
text.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="4"/>', zip=True)
save("xmp4.png", rgb, pnginfo=text)
text = PngImagePlugin.PngInfo()
raw = exif(5).removeprefix(b"Exif\0\0")
text.add_text("Raw profile type exif", "\nexif\n%8d\n%s\n" % (len(raw), raw.hex()), zip=True)
save("raw_profile5.png", rgb, pnginfo=text)
end = save("gamma.png", rgb, gamma=0.3, icc_profile=b"not a profile")[-12:]
add("no_end_chunk.png", save("grey.png", grey)[: -len(end)])
save("colour_key.png", rgb, transparency=tuple(int(v) for v in np.asarray(rgb)[3, 5]))
save("grey_key.png", grey, transparency=int(np.asarray(grey)[9, 9]))
save("bilevel_key.png", grey.convert("1"), transparency=1)
add("rgba16.png", png16(6, 4))
add("la16.png", png16(4, 2))
rgb.save("animated.webp", save_all=True, append_images=[rgb.rotate(180)], quality=50)  # refused
with open("manifest.json", "w") as f:
    json.dump({"images": entries}, f, indent=1)
    f.write("\n")
