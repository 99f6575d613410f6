"""xDiT's package of this name is not carried over; importing it says what to use instead."""

raise ImportError(
    "xDiT's xfuser.model_executor.layers is not carried over: xfuser.parallelize(pipeline, mesh) spreads an untouched "
    "diffusers pipeline, whose attention processors stay its own"
)
