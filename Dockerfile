# GPU:  docker build -t xfuser .
# CPU:  docker build -t xfuser:cpu --build-arg DEVICE=cpu --build-arg BASE=ubuntu:24.04 .
#       (add --build-arg TORCH_INDEX_URL=... with an index of CPU builds of torch for a much smaller image)
# Run:  docker run --rm [--gpus all] -v "$PWD/outputs:/outputs" xfuser --help
ARG BASE=nvidia/cuda:13.0.0-devel-ubuntu24.04
FROM ${BASE}

ARG DEVICE=gpu
ARG TORCH_INDEX_URL=
# Parallel compilers when flash-attn is built from source; each may take several GB of memory.
ARG MAX_JOBS=4

# A compiler and Python's headers serve flash-attn's build, and Triton at run time.
RUN case "$DEVICE" in cpu|gpu) ;; *) echo "DEVICE must be cpu or gpu, not '$DEVICE'" >&2; exit 1 ;; esac \
 && apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates python3 python3-venv \
        $(if [ "$DEVICE" = gpu ]; then echo build-essential python3-dev; fi) \
 && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# torch first, in a layer that changes of the sources leave alone.
WORKDIR /opt/xfuser
COPY constraints.txt ./
RUN python3 -m venv /opt/venv \
 && pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -c constraints.txt torch

COPY . .
RUN pip install -c constraints.txt .

# flash-attn needs a CUDA compiler of the same major version as torch's CUDA, unless it has a wheel built for this
# torch. Where the versions differ, the image goes without it (attention then runs on torch's own kernels).
RUN set -e; \
    if [ "$DEVICE" = gpu ]; then \
        pip install -c constraints.txt ninja packaging psutil setuptools wheel; \
        if ! MAX_JOBS="$MAX_JOBS" pip install --no-build-isolation -c constraints.txt ".[gpu]"; then \
            torch="$(python -c 'import torch; print((torch.version.cuda or "none").split(".")[0])')"; \
            nvcc="$(nvcc --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')"; \
            if [ "$torch" = "$nvcc" ]; then exit 1; fi; \
            echo "WARNING: no flash-attn: torch has CUDA $torch, BASE has CUDA ${nvcc:-compiler: none}; choose a matching BASE"; \
        fi; \
    fi

# ubuntu images keep a user of their own at 1000.
RUN useradd --create-home --uid 10001 xfuser \
 && mkdir -p /outputs \
 && chown xfuser:xfuser /outputs
USER xfuser
WORKDIR /outputs

ENTRYPOINT ["xdit"]
CMD ["--help"]
