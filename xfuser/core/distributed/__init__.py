"""The process, its devices, and what the ranks that share an image tell each other."""
