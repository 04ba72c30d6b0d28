"""How we speak to Ethereum and Base; the only place that knows their libraries.

py_ecc, which eth-account brings in, raises the interpreter's recursion limit to 100,000 when it is
imported.  At that depth a JSON parser overflows the C stack instead of raising RecursionError, so one
deeply nested body would kill a gateway (A67).  It is imported here, first, and the limit put back.
"""

import sys

_limit = sys.getrecursionlimit()
import py_ecc  # noqa: E402, F401

sys.setrecursionlimit(_limit)
