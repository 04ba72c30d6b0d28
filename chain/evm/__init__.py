"""EVM chains: read deposits, sweep forwarders, pay from the Safe.  The only user of web3 and eth_*."""
