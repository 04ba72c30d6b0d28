"""What can go wrong on a chain.

ChainError
├── ChainFault            the environment failed; asking again may help
│   ├── RpcUnavailable    no answer, a timeout, an HTTP or JSON-RPC server error
│   └── UnknownResult     a send may or may not have happened: ask by key, never repeat blindly
├── ChainRefusal          the chain or our rules say no; asking again gives the same answer
│   ├── BadAddress        text that is not a payable address on that chain
│   ├── Reverted          a transaction or dry run that fails on chain
│   └── Malformed         an answer that breaks the protocol (short log, bad padding, wrong type)
└── ChainBroken           an invariant is violated: stop and page
    ├── WrongChain        the node serves another network
    ├── FinalityViolated  a block at or below our final height changed
    └── ProvidersDisagree too few providers agree on a final fact
"""

from __future__ import annotations


class ChainError(Exception):
    """Root of everything `chain` raises on purpose."""


class ChainFault(ChainError):
    """The environment failed; asking again may help."""


class RpcUnavailable(ChainFault):
    """No usable answer from a provider."""


class UnknownResult(ChainFault):
    """A send may or may not have happened."""


class ChainRefusal(ChainError):
    """The chain or our rules say no."""


class BadAddress(ChainRefusal):
    """Not a payable address on that chain."""


class Reverted(ChainRefusal):
    """The transaction (or its dry run) fails on chain."""


class Malformed(ChainRefusal):
    """An answer that breaks the protocol."""


class ChainBroken(ChainError):
    """An invariant is violated."""


class WrongChain(ChainBroken):
    """The node serves another network than configured."""


class FinalityViolated(ChainBroken):
    """A block at or below our final height changed."""


class ProvidersDisagree(ChainBroken):
    """Too few providers agree on a final fact."""
