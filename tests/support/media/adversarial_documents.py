"""Makes files that are neither video nor picture, whatever their names say; many name another file to be opened.

`outward(url)` makes files that ask a reader to fetch a URL or another file. `PDFS` are documents, whole and broken.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any

from PIL import Image

from tests.support.media.adversarial_media import AdversarialFile, holding
from tests.support.media.pdf_files import pdf_bytes
from tests.support.media.video_writers import clip, write_wav

PDF_KIND = "document"


def _video(name: str, data: bytes, says: str = "", outcome: str = "unsupported_media") -> AdversarialFile:
    return AdversarialFile(name, holding(data), outcome, says=says)


def _image(name: str, data: bytes, says: str = "not a picture") -> AdversarialFile:
    return AdversarialFile(name, holding(data), "unsupported_media", "image", says=says)


def outward(url: str, secret: str) -> dict[str, bytes]:
    """Name -> content of files that refer to a URL and to a secret's path; each is refused.

    Args:
        url: of a listener, without a trailing slash.
        secret: absolute path of a file that must not be read.
    """
    host, port = url.removeprefix("http://").split(":")
    playlist = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}/a.ts\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    )
    sdp = (
        f"v=0\r\no=- 0 0 IN IP4 {host}\r\ns=x\r\nc=IN IP4 {host}\r\nt=0 0\r\n"
        f"m=video {port} RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
    )
    dash = (
        '<?xml version="1.0"?>'
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile:isoff-live:2011">'
        f"<BaseURL>{url}/</BaseURL><Period><AdaptationSet><Representation id='a'>"
        f"<SegmentList><SegmentURL media='{url}/s'/>"
        f"</SegmentList></Representation></AdaptationSet></Period></MPD>"
    )
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}/x.png"/><image href="file://{secret}"/></svg>'
    return {
        "playlist.mp4": playlist.encode(),
        "playlist.m3u8": playlist.encode(),
        "playlist-with-mark.mp4": b"\xef\xbb\xbf" + playlist.encode(),
        "playlist-behind-blanks.mkv": b"\r\n\t " + playlist.encode(),
        "key.mp4": playlist.replace("#EXTINF", f'#EXT-X-KEY:METHOD=AES-128,URI="{url}/key"\n#EXTINF', 1).encode(),
        "playlist.pls": f"[playlist]\nFile1={url}/a.mp4\nNumberOfEntries=1\n".encode(),
        "script.mp4": f"ffconcat version 1.0\nfile '{secret}'\nfile '{url}/a.mp4'\n".encode(),
        "session.mp4": sdp.encode(),
        "manifest.mpd": dash.encode(),
        "manifest.mp4": dash.encode(),
        "smooth.ism": f'<?xml version="1.0"?><smil><body><video src="{url}/a"/></body></smil>'.encode(),
        "drawing.mp4": svg.encode(),
        "page.mp4": f'<html><meta http-equiv="refresh" content="0;url={url}/"></html>'.encode(),
        "link.mp4": f"[InternetShortcut]\nURL={url}/\n".encode(),
        "subtitles.mp4": f"# VobSub index file, v7 (do not modify this line!)\nid: en\nfile: {secret}\n".encode(),
        "subtitles.srt": f'1\n00:00:00,000 --> 00:00:01,000\n<img src="{url}/x">\n'.encode(),
        "redirect.asx": f'<asx version="3.0"><entry><ref href="{url}/a.wmv"/></entry></asx>'.encode(),
        "protocol.mp4": f"concat:{secret}|{url}/a.ts".encode(),
        "ident.mp4": b"ID3\x03\0\0\0\0\0\0" + playlist.encode(),
    }


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.mp4", bytes(1000))
    return buffer.getvalue()


def _saved(suffix: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, suffix)
    return buffer.getvalue()


def _muxed(name: str, **encoding: Any) -> AdversarialFile:
    return AdversarialFile(name, clip(**encoding), "unsupported_media", says="unknown kind")


OTHERS = [
    _video("png.mp4", _saved("PNG"), "a PNG picture"),
    _video("jpeg.mp4", _saved("JPEG"), "a JPEG picture"),
    _video("gif.mp4", _saved("GIF"), "a GIF picture"),
    _video("avif.mp4", b"\0\0\0\x1cftypavif" + bytes(99), "a picture"),
    _video("webp.mp4", _saved("WEBP"), "unknown kind"),
    _video("pdf.mp4", b"%PDF-1.7\n%%EOF", "a PDF document"),
    _video("zip.mp4", _zip(), "unknown kind"),
    _video("mp3.mp4", b"\xff\xfb\x90\x00" + bytes(2000), "unknown kind"),
    _video("text.mp4", b"just words\n" * 99, "unknown kind"),
    _video(
        "other-doctype.mkv",
        b"\x1a\x45\xdf\xa3\x8b\x42\x82\x88evil-xyz\nc=IN IP4 127.0.0.1\n",
        "neither Matroska nor WebM",
    ),
    AdversarialFile("wav.mp4", write_wav, "unsupported_media", says="unknown kind"),
    _muxed("flash.flv", codec="flv1"),
    _muxed("program.mpg", codec="mpeg2video", fps=25),
    _muxed("raw.h264"),
    _muxed("nut.nut"),
    _image("video.png", b"\0\0\0\x18ftypisom" + bytes(99)),
    _image("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    _image("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"),
    _image("icon.png", _saved("ICO")),
    _image("portable.png", _saved("PPM")),
    _image("jpeg2000.jpg", _saved("JPEG2000")),
    _image("targa.png", _saved("TGA")),
]


def pdf(pages: int = 1, *, box: str = "0 0 200 100", trailer: str = "", extra: str = "") -> bytes:
    """A small PDF with a cross-reference table."""
    kids = " ".join(f"{4 + number} 0 R" for number in range(min(pages, 50)))
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R {extra} >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {pages} >>",
        "<< /Producer (awkward) >>",
        *(f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] >>" for _ in range(min(pages, 50))),
    ]
    return pdf_bytes(objects, trailer)


_ENCRYPT = f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{'ab' * 32}> /U <{'cd' * 32}> /P -4 >> /ID [<00> <00>]"


def _pdf(name: str, data: bytes, outcome: str = "ok", says: str = "") -> AdversarialFile:
    corners = ((255, 255, 255),) * 4 if outcome == "ok" else ()
    return AdversarialFile(name, holding(data), outcome, PDF_KIND, says=says, corners=corners)


PDFS = [
    _pdf("one-page.pdf", pdf()),
    _pdf("many-pages.pdf", pdf(50)),
    _pdf("behind-other-bytes.pdf", b"\n\nX-Mailer: none\n" + pdf()),
    _pdf("zero-bytes.pdf", b"", "empty_media"),
    _pdf("no-pages.pdf", pdf(0), "corrupt_media", "cannot be opened"),
    _pdf("encrypted.pdf", pdf(trailer=_ENCRYPT), "encrypted_document", "opens with a password only"),
    _pdf("says-a-million-pages.pdf", pdf(1_000_000), "too_large", "1,000,000 pages"),
    _pdf("page-of-kilometres.pdf", pdf(box="0 0 9999999 9999999"), "too_large", "px at page_dpi = 144"),
    _pdf("only-a-header.pdf", b"%PDF-1.7\n", "corrupt_media"),
    _pdf("cut.pdf", pdf(5)[:300], "corrupt_media"),
    _pdf("web-page.pdf", b"<html>" * 9, "unsupported_media", "neither a PDF nor a TIFF"),
    _pdf("picture.pdf", _saved("PNG"), "unsupported_media", "neither a PDF nor a TIFF"),
    _pdf("script.pdf", pdf(extra="/OpenAction << /S /JavaScript /JS (app.alert(1)) >>")),
    _pdf("launch.pdf", pdf(extra="/OpenAction << /S /Launch /F (/bin/sh) >>")),
    _pdf("link.pdf", pdf(extra="/OpenAction << /S /URI /URI (http://127.0.0.1:9/) >>")),
]
