"""One file that holds a whole control plane: made while the server runs, verified before it replaces anything."""
