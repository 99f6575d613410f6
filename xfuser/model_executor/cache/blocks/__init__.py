"""Which blocks run: the plan of a step, who makes it, and who carries it out."""
