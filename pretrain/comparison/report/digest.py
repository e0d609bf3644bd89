"""The digest of summary.json at the end of a report's page. This module imports no torch."""

import hashlib


def digest_line(summary: bytes) -> str:
    """The last line of a page whose summary.json has this content, an HTML comment.

    A page that ends otherwise belongs to another summary.json, or one of the two was changed by hand.
    """
    return f"<!-- sha256 of summary.json: {hashlib.sha256(summary).hexdigest()} -->\n"
