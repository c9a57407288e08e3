"""Problem documents (RFC 9457): how every refusal over HTTP is said.

`type` is a relative reference (`/problems/ENROLL-003`), `code` its last part, `advice` what to do next; the page
that explains all codes is generated from the same tables.
"""

from __future__ import annotations

import msgspec

CONTENT_TYPE = "application/problem+json"


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """RFC 9457 section 3.1, with `code`, `advice`, and a fresh `nonce` where the old one was stale."""

    type: str
    title: str
    status: int
    code: str
    detail: str = ""
    advice: str = ""
    nonce: str = ""
    retry_after_s: int = 0
