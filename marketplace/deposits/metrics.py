"""What an operator of Tollway watches about the chains."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge

HEAD_HEIGHT: Final = Gauge("tollway_chain_head_height", "Newest block of the node", ["chain"])
FINAL_HEIGHT: Final = Gauge("tollway_chain_final_height", "Block the books stand on", ["chain"])
FINAL_LAG: Final = Gauge("tollway_chain_final_lag_blocks", "Final blocks not in the books yet", ["chain"])
FINAL_UNMOVED: Final = Gauge(
    "tollway_chain_final_unmoved_seconds", "How long the node has called the same block final", ["chain"]
)
HALTED: Final = Gauge("tollway_chain_halted", "1 while credits on the chain are stopped", ["chain"])
REORGS: Final = Counter("tollway_chain_reorgs", "Reorgs above finality", ["chain"])
ODDITIES: Final = Counter(
    "tollway_chain_oddities",
    "Lagging, regressing or stalling nodes, failed ticks, by kind",
    ["chain", "kind"],
)
PROVIDER_FAULTS: Final = Counter(
    "tollway_chain_provider_faults", "Answers that were late, wrong or missing", ["chain", "provider", "kind"]
)
CREDITED: Final = Counter("tollway_deposits_credited_micro", "USDC credited, in micros", ["chain"])
