"""From logits to the text of an answer: rules and constraints, sampling, spelling, stop strings."""
