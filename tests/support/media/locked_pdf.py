"""Encrypts small PDFs by a password: the standard security handler, revision 2, RC4 of 40 bits (PDF 1.7, 7.6)."""

from __future__ import annotations

from hashlib import md5
from pathlib import Path

from tests.support.media.pdf_files import page

_PAD = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")
_ID, _ALLOWED = bytes(16), -4


def rc4(key: bytes, data: bytes) -> bytes:
    """Encrypt or decrypt."""
    state, j, out, i = list(range(256)), 0, bytearray(), 0
    for n in range(256):
        j = (j + state[n] + key[n % len(key)]) % 256
        state[n], state[j] = state[j], state[n]
    j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def write_locked_pdf(path: Path, number: int, password: str) -> Path:
    """Write a PDF of the page ``number`` that opens by this password alone."""
    padded = (password.encode("latin-1") + _PAD)[:32]
    owner = rc4(md5(padded).digest()[:5], padded)
    key = md5(padded + owner + _ALLOWED.to_bytes(4, "little", signed=True) + _ID).digest()[:5]
    entries, content = page(number)
    stream = rc4(md5(key + (4).to_bytes(3, "little") + bytes(2)).digest()[:10], content.encode())
    bodies = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R {entries} /Contents 4 0 R >>".encode(),
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream),
        f"<< /Filter /Standard /V 1 /R 2 /O <{owner.hex()}> /U <{rc4(key, _PAD).hex()}> /P {_ALLOWED} >>".encode(),
    ]
    out, places = bytearray(b"%PDF-1.4\n"), []
    for index, body in enumerate(bodies, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (index, body)
    start = len(out)
    out += b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    ids = f"[<{_ID.hex()}> <{_ID.hex()}>]"
    out += f"trailer << /Size 6 /Root 1 0 R /Encrypt 5 0 R /ID {ids} >>\nstartxref\n{start}\n%%EOF\n".encode()
    path.write_bytes(out)
    return path
