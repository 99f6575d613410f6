"""Import paths that users of other engines know; the engine itself finds the model's declaration by its class."""
