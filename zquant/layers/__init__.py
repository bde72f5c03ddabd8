"""Building blocks of the networks: linear layers, norms, rotations, attention."""
