"""Is it gone, sample by sample? IAM, its calibration, attacks with shadow models, and the protocols that judge them."""
