"""The throughput of bulk classification against the plain model in other programs, and against its own counted cost."""
