"""Training of convex losses, and bounds on how far deletions move its result."""
