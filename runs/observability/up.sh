#!/usr/bin/env bash
# A store and the alert rules without containers, on loopback, until interrupted: bash runs/observability/up.sh DIR
# DIR keeps the programs (fetched once, from Debian's mirror) and the data. Then, for a run in another shell:
#   export OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://127.0.0.1:8428/opentelemetry/v1/metrics
# Look at http://127.0.0.1:8428/vmui and http://127.0.0.1:8880; a Grafana elsewhere takes the folder dashboards/ and the store as a
# Prometheus data source. Without any of these: python -m scripts.mc_dash RUN_DIR
set -euo pipefail
[ $# = 1 ] || { echo "error: usage: bash runs/observability/up.sh DIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
dir=$(cd "$1" && pwd)
if ! command -v victoria-metrics > /dev/null; then
  bash "$here/fetch_backend.sh" "$dir"
  export PATH="$dir/root/usr/bin:$PATH"
fi
port=${PORT:-8428} alerts_port=${ALERTS_PORT:-8880}
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
victoria-metrics -httpListenAddr="127.0.0.1:$port" -storageDataPath="$dir/data" -retentionPeriod=1y -opentelemetry.usePrometheusNaming \
  -loggerLevel=WARN &
vmalert -rule="$here/alerts.yaml" -datasource.url="http://127.0.0.1:$port" -remoteWrite.url="http://127.0.0.1:$port" -notifier.blackhole \
  -httpListenAddr="127.0.0.1:$alerts_port" -evaluationInterval=30s -loggerLevel=ERROR &
echo "store: http://127.0.0.1:$port/vmui   alerts: http://127.0.0.1:$alerts_port"
echo "export OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://127.0.0.1:$port/opentelemetry/v1/metrics"
wait -n
