"""The job that plans: from an allowed loss of accuracy to a server's configuration."""
