"""xDiT's names on top of this engine: what scripts and services written for xDiT import."""
