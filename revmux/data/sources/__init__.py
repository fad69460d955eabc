"""Where labelled text comes from, one file per source."""
