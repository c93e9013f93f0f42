# hayhost in a container: an ordinary user, workers isolated at the level confined, a root that may be read-only.
#
#   docker build -t hayhost .
#   docker run --rm -v hayhost:/data hayhost token create admin                         # once: it prints the token
#   docker run -d --name hayhost --init --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#       --stop-timeout 60 --ulimit nofile=65536 -p 127.0.0.1:8000:8000 -v hayhost:/data -v ./plugins:/plugins:ro hayhost
#
# docs/deploying.md says what each of these is for.

FROM python:3.13-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY hayhost hayhost
COPY sandbox sandbox
RUN python -m venv /opt/hayhost && /opt/hayhost/bin/pip install --no-cache-dir ".[postgresql]"

FROM python:3.13-slim-bookworm
COPY --from=build /opt/hayhost /opt/hayhost
# By number, so that an orchestrator can see that it is not root.
RUN useradd --system --uid 10001 --user-group --home-dir /data --shell /usr/sbin/nologin hayhost \
    && install -d -o 10001 -g 10001 -m 0700 /data && install -d /plugins
USER 10001:10001
WORKDIR /data
VOLUME /data
# In a container only what is published can be reached from outside; the host still wants a token to exist.
ENV HAYHOST_HOST=0.0.0.0 HAYHOST_PORT=8000 HAYHOST_ISOLATION=confined HAYHOST_LOG_FORMAT=json PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["/opt/hayhost/bin/python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/hayhost/bin/hayhost"]
CMD ["serve", "/plugins"]
