"""Chain events become money in the ledger: addresses, watchers, sweeps, proof that books meet chain."""
