"""Solana: reading deposits, paying batches, deposit addresses.  The only user of solders outside localnet."""
