"""The web pages of the kit, as built from the sources in web/ at the top of the repository."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
# Only the page's own files may run. A chat page may send requests to any server that its user names.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src {}; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def page(name: str, connect: str = "'self'") -> dict[str, tuple[bytes, dict[str, str]]]:
    """Return the files of a page, "chat" or "manager": the content and the HTTP headers of each path.

    Args:
        name: of the page; its HTML has the path "/".
        connect: sources of the Content-Security-Policy that the page may send requests to.
    """
    security = {
        "Content-Security-Policy": _POLICY.format(connect),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return {
        "/" if kind == ".html" else f"/{name}{kind}": (
            (FOLDER / f"{name}{kind}").read_bytes(),
            {"Content-Type": media, **security},
        )
        for kind, media in TYPES.items()
    }
