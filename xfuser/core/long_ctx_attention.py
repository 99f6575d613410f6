"""xDiT's module of this name is not carried over; importing it says what to use instead."""

raise ImportError(
    "xDiT's xfuser.core.long_ctx_attention is not carried over: xfuser.parallelize(pipeline, mesh) gives a pipeline "
    "sequence-parallel attention; for a model of your own use yunchang.LongContextAttention"
)
