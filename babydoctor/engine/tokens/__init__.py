"""From logits to the text of an answer: logit rules, JSON constraints, sampling, detokenizing and stop strings."""
