"""Samples, roles, probes; datasets by name; files; deletion sets."""

from expunge.data.refusals import idk_answers

__all__ = ["idk_answers"]
