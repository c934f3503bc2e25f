# Debian rather than Alpine: Bun's glibc build is the one that this project's tests run on.
FROM oven/bun:1.4.5-slim

# Where the source is, for whoever finds the image: --build-arg SOURCE=https://...
ARG SOURCE
LABEL org.opencontainers.image.title="party-sockets" \
      org.opencontainers.image.version="1.0.0" \
      org.opencontainers.image.source="$SOURCE"

WORKDIR /app
COPY regions.ts server.ts ./

# The base image's own user; the relay writes no file.
USER bun
ENV PORT=3000
EXPOSE $PORT

# /health is 200 also while draining, so that nobody restarts it meanwhile. The check gives up by itself, before the engine
# does: not every engine ends a check that hangs. It asks the relay at its HOST, past any HTTP proxy of the environment.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s \
  CMD ["bun", "-e", "const { HOST, PORT } = process.env; \
    const host = HOST?.includes(':') ? '[' + HOST + ']' : HOST || 'localhost'; \
    const url = 'http://' + host + ':' + PORT + '/health'; \
    const { ok } = await fetch(url, { proxy: false, signal: AbortSignal.timeout(3000) }); \
    process.exit(ok ? 0 : 1)"]

# Exec form: the relay is process 1 and gets the stop signal itself.
CMD ["bun", "server.ts"]
