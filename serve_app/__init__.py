"""A Ray Serve deployment that multiplexes live requests through the frozen backbone."""
