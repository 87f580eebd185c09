#!/usr/bin/env bash
# VictoriaMetrics (takes OTLP, answers PromQL) from Debian's next suite into DIR, without touching this machine's packages:
#   bash runs/observability/fetch_backend.sh DIR          then DIR/root/usr/bin/victoria-metrics, vmagent, vmalert
# Uses the mirror in /etc/apt/sources.list.d/debian.sources. Exit code 3: it cannot be had here.
set -euo pipefail
[ $# = 1 ] || { echo "error: usage: bash runs/observability/fetch_backend.sh DIR" >&2; exit 2; }
dir=$1
[ -x "$dir/root/usr/bin/victoria-metrics" ] && exit 0
sources=/etc/apt/sources.list.d/debian.sources
if ! [ -r $sources ] || ! command -v apt-get > /dev/null; then
  echo "error: no Debian package source on this machine ($sources): put victoria-metrics into the PATH instead" >&2
  exit 3
fi
mkdir -p "$dir"/apt/{lists/partial,cache/archives/partial,preferences.d,sources.d}
dir=$(cd "$dir" && pwd)
# only the first entry, for the suite that has the package
sed -e 's/^Suites:.*/Suites: trixie/' -e '/^$/,$d' $sources > "$dir/apt/sources.d/trixie.sources"
cat > "$dir/apt/apt.conf" << CONF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$dir/apt/sources.d";
Dir::Etc::preferencesparts "$dir/apt/preferences.d";
Dir::State::lists "$dir/apt/lists";
Dir::Cache "$dir/apt/cache";
APT::Sandbox::User "root";
CONF
export APT_CONFIG=$dir/apt/apt.conf
cd "$dir"
if ! { apt-get -qq update && apt-get -qq download victoria-metrics; } > apt.log 2>&1; then
  echo "error: the package victoria-metrics cannot be fetched ($(tail -n 1 apt.log))" >&2
  exit 3
fi
dpkg-deb -x victoria-metrics_*.deb root
rm -rf victoria-metrics_*.deb apt
