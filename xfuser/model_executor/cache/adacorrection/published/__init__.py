"""The forms of AdaCorrection as its paper has them, or near to it: exact, by tolerance, by layer and by token."""
