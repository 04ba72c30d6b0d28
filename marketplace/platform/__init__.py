"""What every part of the marketplace stands on: settings, database, time, ids, servers, logging."""
