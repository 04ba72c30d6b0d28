"""Development chains on this machine: real nodes and real contract code, for `tollway up` and the tests.

Nothing here is used against a public network.
"""
