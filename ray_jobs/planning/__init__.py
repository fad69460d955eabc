"""The plan job, which turns an allowed loss of accuracy into a server's configuration."""
