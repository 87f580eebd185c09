#!/usr/bin/env bash
# From the training step to the dashboards, for real: a metrics store and a collector on this machine, a small MegaContext and a small
# vanilla run, then every number compared and every panel and alert queried. Arguments go to runs/observability/e2e.py.
# BACKEND=DIR keeps the fetched store for the next time. Exit code 3: the store cannot be fetched here.
set -euo pipefail
cd "$(dirname "$0")/../.."
"${PYTHON:-python}" -c 'import grpc, opentelemetry.exporter.otlp.proto.http, opentelemetry.proto, opentelemetry.sdk' 2> /dev/null || {
  echo "error: needs the extra otel, which is not installed: pip install 'megacontext[otel]'" >&2
  exit 2
}
if ! command -v victoria-metrics > /dev/null; then
  backend=${BACKEND:-$(mktemp -d)}
  [ -n "${BACKEND:-}" ] || trap 'rm -rf "$backend"' EXIT
  bash runs/observability/fetch_backend.sh "$backend"
  export PATH=$backend/root/usr/bin:$PATH
fi
"${PYTHON:-python}" runs/observability/e2e.py "$@"
