# syntax=docker/dockerfile:1
#
#   docker build -t punchline .                                 with CUDA; needs an NVIDIA driver of 580 or newer to run
#   docker build -t punchline:cpu --build-arg VARIANT=cpu --build-arg TORCH_CPU_INDEX=.. .     without
#   docker run --gpus all -p 8000:8000 punchline
#
# Every PUNCHLINE_* setting is an environment variable of the container (`docker run --rm punchline serve --help`):
#
#   docker run --gpus all -p 8000:8000 -v punchline-hub:/var/cache/huggingface \
#       -e PUNCHLINE_MODEL=owner/name@revision -e PUNCHLINE_API_KEY punchline
#   docker run --gpus all -p 8000:8000 -v "$PWD/artifact:/artifact:ro" -v "$PWD/base:/base:ro" \
#       -e PUNCHLINE_MODEL=/artifact -e PUNCHLINE_BASE_MODEL=/base -e PUNCHLINE_OFFLINE=true -e HF_HUB_OFFLINE=1 punchline
#
# The volume keeps what came from the Hub. PUNCHLINE_OFFLINE serves from it and from local files only; HF_HUB_OFFLINE makes every
# library refuse to ask. The demo model is in the image and asks nobody.
#
# The server runs as user 10001 and writes nowhere but to that volume: `--read-only --tmpfs /tmp` works, and any `--user` with local files.
# What you mount must be readable to it, and safetensors writes files for their owner only: `chmod -R a+rX artifact`, or `--user`.
# Stopping answers what was accepted, for up to PUNCHLINE_DRAIN_S: give `docker stop -t` more than that.
# In Kubernetes set `enableServiceLinks: false`: a Service called punchline would add PUNCHLINE_PORT=tcp://.. to the environment.
#
# A package index of your own: `--build-arg PIP_INDEX_URL=..`, or `--secret id=pip.conf,src=pip.conf` if it holds a password.

ARG VARIANT=gpu
ARG GPU_BUILD_BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
# torch brings its own cuBLAS, cuDNN and NCCL, so the `runtime` bases would hold them twice.
ARG GPU_BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG CPU_BASE=debian:bookworm-slim

FROM ${GPU_BUILD_BASE} AS build-gpu
FROM ${CPU_BASE} AS build-cpu
FROM ${GPU_BASE} AS base-gpu
FROM ${CPU_BASE} AS base-cpu


# Everything but our own code, in /opt/venv. pip works on it from outside, so that the image has none.
FROM build-${VARIANT} AS dependencies
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/venv

# How pip finds packages: the standard variables, none of them kept in the image, and a pip.conf as a build secret.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ARG PIP_DEFAULT_TIMEOUT
ENV PIP_CONFIG_FILE=/run/secrets/pip.conf \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_PYTHON=/opt/venv/bin/python \
    PIP_ROOT_USER_ACTION=ignore

# torch first, alone: the default build carries CUDA. The CPU build has an index of its own, which torch's install page names:
# `--build-arg TORCH_CPU_INDEX=..`. Empty: the CPU build is in your index, or a larger image does no harm.
ARG VARIANT
ARG TORCH_CPU_INDEX=
WORKDIR /build
COPY constraints.txt .
RUN --mount=type=secret,id=pip.conf --mount=type=cache,target=/root/.cache/pip \
    torch=$(grep '^torch==' constraints.txt) \
    && if [ "$VARIANT" = cpu ] && [ -n "$TORCH_CPU_INDEX" ]; then \
        /opt/pip/bin/pip install --no-deps --index-url "$TORCH_CPU_INDEX" "$torch"; \
    fi \
    && /opt/pip/bin/pip install --constraint constraints.txt "$torch"

# flash-attn is compiled against that torch, for Ampere and Hopper; up to an hour. FLASH_ATTN= leaves it out.
ARG FLASH_ATTN=flash-attn==2.8.3.post2
ARG FLASH_ATTN_CUDA_ARCHS=80;90
ARG MAX_JOBS=4
RUN --mount=type=secret,id=pip.conf --mount=type=cache,target=/root/.cache/pip \
    if [ "$VARIANT" = gpu ] && [ -n "$FLASH_ATTN" ]; then \
        apt-get update \
        && apt-get install -y --no-install-recommends g++ ninja-build python3-dev \
        && rm -rf /var/lib/apt/lists/* \
        && /opt/pip/bin/pip install --constraint constraints.txt packaging psutil wheel \
        && /opt/pip/bin/pip install --constraint constraints.txt --no-build-isolation "$FLASH_ATTN" \
        && /opt/pip/bin/pip uninstall -y wheel; \
    fi

# The list of dependencies without the code, so that code changes install nothing again.
COPY pyproject.toml .
RUN --mount=type=secret,id=pip.conf --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && /opt/pip/bin/pip install --constraint constraints.txt --requirement requirements.txt


# Our own code, laid out under /code as it will lie in the image: a layer of its own, small.
FROM dependencies AS code
COPY README.md .
COPY training training
COPY app app
# torch depends on setuptools, so the build backend is there already and nothing is downloaded.
RUN /opt/pip/bin/pip install --no-deps --no-index --no-build-isolation --no-warn-script-location --root /code .


FROM base-${VARIANT}
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 punchline \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin punchline \
    && install -d -o punchline -g punchline /var/cache/huggingface
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=code /code/opt/venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PUNCHLINE_HOST=0.0.0.0 \
    PUNCHLINE_PORT=8000
VOLUME ["/var/cache/huggingface"]
WORKDIR /home/punchline
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 8000

# Alive, not ready: a draining server is unready and well. Nothing answers while a model loads, or comes from the Hub for the first
# time, hence the long start period; the first answer ends it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1:' + os.environ['PUNCHLINE_PORT'], timeout=4); \
c.request('GET', '/livez'); raise SystemExit(c.getresponse().status != 200)"]

# tini is process 1 because the kernel drops signals that process 1 has no handler for, and Python has none for SIGTERM while a model
# loads: without it `docker stop` would wait out its grace period then. It passes on every signal and the exit code.
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "punchline"]
CMD ["serve"]

ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="Punchline" \
    org.opencontainers.image.description="Preference scores for captions over HTTP" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION"
