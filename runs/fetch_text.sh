#!/usr/bin/env bash
# About 35 MB of clean text into DIR/text, for ingesting histories: documentation of Linux and of Python, from Debian packages
# (needs apt and dpkg; nothing is installed). Versions are those the results in the log were measured with; where the mirror
# has newer ones, these are taken, and said.
set -euo pipefail
DIR="$(realpath -m "${1:?usage: bash runs/fetch_text.sh DIR}")"
cd "$(dirname "$0")/.."
mkdir -p "$DIR/deb" "$DIR/text"
cd "$DIR/deb"
PACKAGES=(linux-doc-6.1=6.1.192-2 python3.11-doc=3.11.2-6+deb12u9)
for package in "${PACKAGES[@]}"; do
  name="${package%%=*}"
  ls "${name}"_*.deb > /dev/null 2>&1 && continue
  apt-get -q download "$package" || { echo "note: $package is not on the mirror, taking its present version"; apt-get -q download "$name"; }
done
for deb in ./*.deb; do
  dpkg-deb -x "$deb" "$DIR/root"
done
cd "$DIR/root/usr/share/doc"
find linux-doc-6.1/Documentation -name '*.rst.gz' | while read -r f; do
  mkdir -p "$DIR/text/$(dirname "$f")"; gzip -dc "$f" > "$DIR/text/${f%.gz}"
done
find linux-doc-6.1/Documentation python3.11/html/_sources \( -name '*.rst' -o -name '*.txt' -o -name '*.md' \) -type f | while read -r f; do
  mkdir -p "$DIR/text/$(dirname "$f")"; cp "$f" "$DIR/text/$f"
done
rm -rf "$DIR/root"
echo "$(find "$DIR/text" -type f | wc -l) files, $(du -sb --apparent-size "$DIR/text" | cut -f1) bytes in $DIR/text"
