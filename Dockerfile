# One image for every process; compose.yaml has the commands. Nothing but the locked packages gets in, by their hashes.
# The version stands in the FROM lines and not in an ARG: Dependabot moves it only there.

FROM python:3.14.7-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements.lock requirements-dev.lock ./
RUN python -m venv /venv && /venv/bin/pip install --require-hashes -r requirements.lock
# The build backend, at the version that the lock of the development dependencies has.
RUN awk '/^[a-z]/ { wanted = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/ } wanted' \
        requirements-dev.lock > requirements-build.lock \
    && pip install --require-hashes -r requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY relay ./relay
COPY service ./service
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist . && /venv/bin/pip install --no-deps dist/*.whl

FROM python:3.14.7-slim-trixie
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin service
WORKDIR /app
COPY --from=build /venv /venv
COPY alembic.ini ./
COPY migrations ./migrations
# What the processes call this code where they are listed: docker build --build-arg VERSION=$(git rev-parse HEAD).
ARG VERSION=
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 VERSION=$VERSION
# Where relay and workers show that they live, for `python -m service.telemetry.probe`.
ENV PROBE_FOLDER=/tmp/alive
# By number, so that an orchestrator can see that it is not root.
USER 10001
EXPOSE 8000
# Exec form, here and in compose.yaml: SIGTERM reaches the process itself and not a shell that ignores it.
CMD ["uvicorn", "service.api:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", "--http", "service.http.protocol:BoundedProtocol", "--no-server-header", "--timeout-graceful-shutdown", "15"]
