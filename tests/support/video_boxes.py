"""Boxes of MP4 files, written by hand after ISO/IEC 14496-12."""

import struct


def box(kind, content=b""):
    return struct.pack(">I4s", 8 + len(content), kind) + content


def track(kind, description=b"", extra=b""):
    handler = box(b"hdlr", bytes(8) + kind + bytes(13))
    table = box(b"stbl", box(b"stsd", bytes(4) + struct.pack(">I", bool(description)) + description))
    # The data handler that MOV files have in minf is no track of its own.
    return box(b"trak", box(b"mdia", handler + box(b"minf", box(b"hdlr", bytes(8) + b"alis" + bytes(13)) + table)) + extra)
