#!/usr/bin/env bash
# Everything that can be measured on one machine without other trainers, in one JSON to send: tunesmith doctor --full, and the
# benchmarks that need no data. Let nothing else run: a stage of the examination ends after 20 minutes.
# bash bench/mac.sh [--out FILE] [--smoke]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=measurements.json
smoke=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --smoke) smoke=(--smoke); shift ;;
    *) echo "usage: bash bench/mac.sh [--out FILE] [--smoke]" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-$here/../.venv/bin/python}
[[ -x "$python" ]] || python=python3
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
status=0
if [[ ${#smoke[@]} -eq 0 ]]; then
  # Its own file goes into the one of this script, so the line that names it is left out.
  "$python" -m tunesmith doctor --full --out "$folder/doctor.json" "$folder" | sed '/^written to /d' || status=$?
fi
for script in scaling experts; do
  "$python" "$here/$script.py" ${smoke[@]+"${smoke[@]}"} --out "$folder/$script.json" >&2 || status=$?
done
"$python" - "$folder" "$out" <<'PY'
import json, sys
from pathlib import Path
from tunesmith.preflight.thorough.report import scrubbed
found = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(Path(sys.argv[1]).glob("*.json"))}
Path(sys.argv[2]).write_text(json.dumps(scrubbed(found), indent=1, ensure_ascii=False) + "\n", "utf-8")
PY
echo "written to $out" >&2
exit "$status"
