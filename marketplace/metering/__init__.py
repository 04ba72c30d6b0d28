"""What a request costs: pure counting, bounds and settlement.  No I/O."""
