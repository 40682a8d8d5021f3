"""The paper's figure, redone, and where unlearning does not pay."""
