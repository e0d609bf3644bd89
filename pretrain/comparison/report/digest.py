"""The format of summary.json, and its digest at the end of a page. This module imports no torch."""

import hashlib

SUMMARY_FORMAT = 3
"""Format of summary.json. 3 has the number of documents in the intervals, and rules of caveats."""


def digest_line(summary: bytes) -> str:
    """The last line of a page whose summary.json has this content, an HTML comment.

    A page that ends otherwise belongs to another summary.json, or one of the two was changed by hand.
    """
    return f"<!-- sha256 of summary.json: {hashlib.sha256(summary).hexdigest()} -->\n"
