# SPDX-License-Identifier: Apache-2.0
"""Filters of the role gateway."""

from __future__ import annotations

import datetime
from urllib.parse import quote

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key


def backend(model: str) -> str:
    """The name of a served model's backend, for which HAProxy has letters, digits and ``._:-``."""
    return "model:" + quote(model, safe="").replace("~", "%7E").replace("%", ":")


def tls_fault(certificate: str, key: str) -> str:
    """What speaks against a certificate and its key; empty if nothing does.

    Args:
        certificate: in PEM, with those that lead to its root after it.
        key: in PEM.
    """
    try:
        chain = x509.load_pem_x509_certificates(certificate.encode(errors="replace"))
    except ValueError:
        return "the certificate is not one in PEM"
    try:
        private = load_pem_private_key(key.encode(errors="replace"), password=None)
    except TypeError:
        return "the key is encrypted, and nobody could give HAProxy its passphrase"
    except (ValueError, UnsupportedAlgorithm):
        return "the key is not one in PEM"
    if chain[0].public_key() != private.public_key():
        return "the first certificate in the file is that of another key"
    now = datetime.datetime.now(datetime.UTC)
    for link in chain:
        who = link.subject.rfc4514_string() or "without a name"
        if link.not_valid_after_utc < now:
            return f"the certificate {who} expired on {link.not_valid_after_utc:%Y-%m-%d}"
        if link.not_valid_before_utc > now:
            return (
                f"the certificate {who} is valid from {link.not_valid_before_utc:%Y-%m-%d} on only"
            )
    return ""


class FilterModule:
    def filters(self) -> dict[str, object]:
        return {"gateway_backend": backend, "gateway_tls_fault": tls_fault}
