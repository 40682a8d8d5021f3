"""Training to a tolerance, and how far deletions move where it ends."""
