"""Certificates: claims with their evidence, the signed statement, and its verification."""
