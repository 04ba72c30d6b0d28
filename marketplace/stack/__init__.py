"""Everything on one machine: the development stack behind `tollway up`, `down` and `demo`."""
