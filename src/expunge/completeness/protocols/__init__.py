"""Protocols: worlds in which the truth is known, and every score measured against it."""

from expunge.completeness.protocols.runner import PROTOCOLS, get_protocol, run_protocol
from expunge.completeness.protocols.world import ProtocolOptions

__all__ = ["PROTOCOLS", "ProtocolOptions", "get_protocol", "run_protocol"]
