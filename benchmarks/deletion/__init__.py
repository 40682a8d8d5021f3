"""What deletion costs, method by method, beside the cheapest retraining."""
