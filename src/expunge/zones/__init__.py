"""Private knowledge in a removable memory over a frozen base, so that forgetting is exact by construction."""
