"""One forward pass of one model leaves numbers per target token; metrics and attacks are functions of them."""
