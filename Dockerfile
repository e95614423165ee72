# The relay as an image. It needs RELAY_MONGO_URI (a replica set or a sharded cluster) or a volume at /data for its own
# MongoDB (x86-64 only).
FROM debian:12-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv libcurl4 libssl3 ca-certificates \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /srv/relay
COPY config/requirements/run.txt config/requirements/run.txt
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir --require-hashes -r config/requirements/run.txt
COPY relay relay
COPY models models
COPY handlers handlers
COPY config config
RUN useradd --system --home-dir /data relay && install -d -o relay /data
USER relay
ENV RELAY_HOST=0.0.0.0 RELAY_DATA_DIR=/data PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s CMD [".venv/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/readyz', timeout=2)"]
CMD [".venv/bin/python", "-m", "relay"]
