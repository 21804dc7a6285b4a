#!/usr/bin/env bash
# Download COCO 2017 (train and val) to data/COCO, where process_captions.py and train.py look for it.
# It can be stopped at any time and run again: it resumes downloads and skips what is complete.
set -euo pipefail

BASE_URL=http://images.cocodataset.org
OUT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/data/COCO"
KEEP_ZIPS=no
ONLY=""

usage() {
    cat <<EOF
usage: bash utils/download_coco_dataset.sh [--out DIR] [--only PART] [--keep-zips] [--base-url URL]

Downloads COCO 2017 and unpacks it to
    DIR/annotations/          captions_train2017.json and others     0.25 GB zip,  1 GB unpacked
    DIR/images/val2017/       5,000 images                           0.8 GB,       0.8 GB
    DIR/images/train2017/     118,287 images                         19 GB,        19 GB
Each zip is deleted after unpacking, so 41 GB are needed at most and 21 GB in the end.

  --out DIR       where to put it (default: data/COCO in this project)
  --only PART     annotations, val or train; may be repeated (default: all three)
  --keep-zips     keep the zip files in DIR
  --base-url URL  another server with the same files (default: $BASE_URL)
EOF
}

die() { # CODE MESSAGE: 2 for bad usage or too little disk space, 1 for what may work another time
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}
size_of() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }
is_zip() { unzip -tqq "$1" >/dev/null 2>&1 </dev/null; } # reads all of it and compares every checksum

check_space() { # URL FILE: room for the rest of the zip and for as much again unpacked
    local size free
    size=$(curl -fsSIL --max-time 60 "$1" | tr -d '\r' | awk 'tolower($1) == "content-length:" { n = $2 } END { printf "%.0f", n }') ||
        die 1 "cannot get $1"
    if [ "$(size_of "$2")" -gt "$size" ]; then rm -f "$2"; fi # of another version of the zip
    # The number before the percentage, because names of disks and folders may contain spaces.
    free=$(df -Pk "$OUT" | awk 'NR == 2 { for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+%$/) { printf "%.0f", $(i - 1) * 1024; exit } }')
    [ "$free" -ge $((2 * size - $(size_of "$2"))) ] ||
        die 2 "too little space in $OUT: $((2 * size / 1000000000)) GB needed, $((free / 1000000000)) GB free; use --out or --only"
}

fetch() { # URL FILE: until FILE is a whole zip; give up after three attempts that add nothing
    local before code failures=0 quiet="-sS"
    if [ -t 2 ]; then quiet=""; fi
    until is_zip "$2"; do
        [ "$failures" -lt 3 ] || die 1 "$1: got $(size_of "$2") bytes, not a whole zip; run this again to resume"
        before=$(size_of "$2") code=0
        # shellcheck disable=SC2086
        curl $quiet -fL --connect-timeout 30 --speed-limit 1 --speed-time 60 -C - -o "$2" "$1" || code=$?
        if [ "$code" = 22 ] || [ "$code" = 33 ] || { [ "$code" = 0 ] && ! is_zip "$2"; }; then
            rm -f "$2" # the server cannot send the rest, or the parts do not fit: start again
        fi
        if [ "$(size_of "$2")" -le "$before" ]; then failures=$((failures + 1)); fi
        [ "$code" = 0 ] || sleep 1
    done
}

while [ $# -gt 0 ]; do
    case $1 in
    --help | -h) usage && exit 0 ;;
    --keep-zips) KEEP_ZIPS=yes && shift && continue ;;
    --out | --base-url | --only) [ -n "${2:-}" ] || die 2 "$1 needs a value; see --help" ;;
    *) die 2 "unknown argument \"$1\"; see --help" ;;
    esac
    case $1:$2 in
    --out:*) OUT=$2 ;;
    --base-url:*) BASE_URL=${2%/} ;;
    --only:annotations | --only:val | --only:train) ONLY="$ONLY $2" ;;
    *) die 2 "--only takes annotations, val or train, not \"$2\"" ;;
    esac
    shift 2
done
for tool in curl unzip; do command -v "$tool" >/dev/null || die 2 "$tool is not installed"; done
mkdir -p "$OUT" 2>/dev/null && [ -w "$OUT" ] || die 2 "cannot write to the folder $OUT; choose another with --out"
UNPACKING="$OUT/.unpacking"
trap 'rm -rf "$UNPACKING"' EXIT

for part in ${ONLY:-annotations val train}; do
    case $part in
    annotations) name=annotations_trainval2017 url="$BASE_URL/annotations" inner=annotations folder="$OUT/annotations" ;;
    *) name=${part}2017 url="$BASE_URL/zips" inner=${part}2017 folder="$OUT/images/${part}2017" ;;
    esac
    zip="$OUT/$name.zip"
    # A folder gets its final name when it is complete, so one that exists and is not empty is done.
    if [ -n "$(ls -A "$folder" 2>/dev/null)" ]; then
        echo "$folder exists"
        continue
    fi
    if [ ! -f "$zip" ]; then
        check_space "$url/$name.zip" "$zip.part"
        echo "downloading $url/$name.zip"
        fetch "$url/$name.zip" "$zip.part"
        mv "$zip.part" "$zip"
    fi
    echo "unpacking $zip to $folder"
    rm -rf "$UNPACKING"
    mkdir -p "$UNPACKING" "$(dirname "$folder")"
    unzip -qqn "$zip" -d "$UNPACKING" </dev/null || die 1 "could not unpack $zip; delete it if it is damaged, or free some space"
    [ -d "$UNPACKING/$inner" ] || die 1 "$zip has no folder $inner, so it is not COCO's; delete it"
    if [ -d "$folder" ]; then rmdir "$folder"; fi
    mv "$UNPACKING/$inner" "$folder"
    if [ "$KEEP_ZIPS" = no ]; then rm -f "$zip"; fi
done
echo "COCO 2017 is in $OUT; next: python process_captions.py"
