"""Classification of whole data sets: units of work, their files, resuming, audits and summaries."""
