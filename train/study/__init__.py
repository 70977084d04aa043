"""Studies: arms, what they cost, and how they are run on one machine or a cluster."""
