"""The best attack known: a lower bound on epsilon."""
