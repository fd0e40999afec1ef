"""Photographs with metadata, written by Pillow, and readers of them that share no code with the package."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

GPANO = "http://ns.google.com/photos/1.0/panorama/"
DC = "http://purl.org/dc/elements/1.1/"
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
MAKER_NOTE = bytes(range(256)) * 3
SUFFIXES = (".jpg", ".png", ".tif", ".webp")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def packet(properties="", elements=""):
    """Return an XMP packet whose description has these attributes and elements."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n<!-- by a test -->'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}">'
        f'<rdf:Description rdf:about="" xmlns:GPano="{GPANO}" xmlns:dc="{DC}" {properties}>{elements}'
        f"</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end='w'?>"
    ).encode()


def exif_block(orientation=1):
    """Return EXIF with a camera, a maker note of odd bytes, a place and an orientation."""
    exif = Image.Exif()
    exif[0x0110] = "Sphere 1"
    exif[0x0112] = orientation
    exif[0x8769] = {0x9286: b"a comment", 0x927C: MAKER_NOTE}
    exif[0x8825] = {0x0003: "E"}
    return exif


def noise(rows=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, 2 * rows, 3), dtype=np.uint8)


def write(path, pixels=None, xmp=None, exif=None, icc=None, **options):
    """Write a photograph in the format of its suffix."""
    path = Path(path)
    image = Image.fromarray(noise() if pixels is None else pixels)
    if exif is not None:
        options["exif"] = exif.tobytes()
    if icc is not None:
        options["icc_profile"] = icc
    if path.suffix == ".png" and xmp is not None:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "surrogateescape"))
    elif path.suffix == ".tif" and xmp is not None:
        if exif is None:
            options["tiffinfo"] = TiffImagePlugin.ImageFileDirectory_v2()
            options["tiffinfo"][700] = xmp
        else:
            options["exif"] = Image.Exif()
            options["exif"].load(exif.tobytes())
            options["exif"][700] = xmp
    elif path.suffix == ".webp":
        options = {"lossless": True, **options, **({} if xmp is None else {"xmp": xmp})}
    image.save(path, **options)
    if path.suffix == ".jpg" and xmp is not None:
        insert_segment(path, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)
    return path


def insert_segment(path, marker, data):
    """Insert a segment before all others of a JPEG."""
    file = path.read_bytes()
    path.write_bytes(file[:2] + bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2, "big") + data + file[2:])


def xmp_of(path):
    """Return the root of the one XMP packet that is found in the bytes of a file."""
    (found,) = re.findall(rb"<x:xmpmeta.*?</x:xmpmeta>", Path(path).read_bytes(), re.DOTALL)
    return ET.fromstring(found)


def gpano_of(path):
    """Return the panorama properties of a file's own descriptions, from attributes and elements."""
    found = {}
    for description in xmp_of(path).findall(f"./{{{RDF}}}RDF/{{{RDF}}}Description"):
        pairs = [*description.attrib.items(), *((child.tag, (child.text or "").strip()) for child in description)]
        found |= {name.split("}")[1]: value for name, value in pairs if name.startswith(f"{{{GPANO}}}")}
    return found
