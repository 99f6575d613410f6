"""AdaCorrection (arXiv 2602.13357): measure drift and error per layer and step, and correct where it is needed."""
