"""The job behind ``classify``: a pool of Ray actors that classify units of a data set."""
