"""Plans, accounting, noise, DP-SGD, client-level noise, secure sums. No Ray here; `federation` calls these."""
