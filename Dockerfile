# syntax=docker/dockerfile:1
# An image with the command skillnet. Linted with hadolint; not built yet, as no builder was available.
#   docker build -t skillnet .                               # CPU
#   docker build -t skillnet:cuda --build-arg TORCH=cuda .   # NVIDIA GPU; run with --gpus all
#   docker run --rm -v skillnet:/data --shm-size=4g skillnet quickstart
# Python 3.12.14 of 2026-08-25. A tag can be moved, a digest cannot. Source: docker-library/repo-info,
# commit 33a22f41, repos/python/remote/3.12-slim-bookworm.md.
FROM python:3.12-slim-bookworm@sha256:0f5b26b9518d002b6173fd61daad821fa340635ebfec5bba471013f9ca114579

# cpu: PyTorch's CPU build. cuda: the build of PyPI, which brings its CUDA libraries.
ARG TORCH=cpu
# Extras of pyproject.toml, for example "s3,cluster".
ARG EXTRAS=s3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    SKILLNET_HOME=/data

WORKDIR /opt/skillnet
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY platform platform
COPY skillnet skillnet
COPY pipelines pipelines
COPY sweeps sweeps
COPY plugins plugins
# pyproject.toml bounds the versions.
# hadolint ignore=DL3013
RUN case "${TORCH}" in \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        cuda) ;; \
        *) echo "TORCH: expected cpu or cuda, not ${TORCH}" >&2; exit 2 ;; \
    esac && \
    pip install ./plugins/evidence ".[train,${EXTRAS}]" && \
    useradd --create-home --uid 1000 skillnet && \
    install -d -o skillnet -g skillnet /data

USER 1000
WORKDIR /data
VOLUME /data
ENTRYPOINT ["skillnet"]
CMD ["--help"]
