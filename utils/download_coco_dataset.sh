#!/usr/bin/env bash
# Pictures and annotations of COCO 2017 (train and val) into data/COCO, where process_captions.py and train.py look for them.
# Can be stopped at any time and run again: it goes on where it was, and skips what is done. Written for bash 3.2 and later.
set -euo pipefail

BASE_URL=http://images.cocodataset.org
OUT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/data/COCO"
KEEP_ZIPS=no
ONLY=""

usage() {
    cat <<EOF
usage: bash utils/download_coco_dataset.sh [--out DIR] [--only PART] [--keep-zips] [--base-url URL]

Fetches COCO 2017 and unpacks it to
    DIR/annotations/          captions_train2017.json and others     0.25 GB to fetch,  1 GB unpacked
    DIR/images/val2017/       5,000 pictures                         0.8 GB,            0.8 GB
    DIR/images/train2017/     118,287 pictures                       19 GB,             19 GB
A zip is deleted once it is unpacked, so about 41 GB must be free at the start and 21 GB are taken in the end.

  --out DIR       where to put it (default: data/COCO in this project)
  --only PART     annotations, val or train; may be given more than once (default: all three)
  --keep-zips     leave the zip files in DIR
  --base-url URL  another server with the same files (default: $BASE_URL)
EOF
}

say() { printf '%s\n' "$*"; }
die() { # CODE MESSAGE...: 2 for bad usage or too little room, 1 for what may go well another time
    local code=$1
    shift
    printf 'error: %s\n' "$*" >&2
    exit "$code"
}
gigabytes() { awk -v bytes="$1" 'BEGIN { printf "%.1f GB", bytes / 1e9 }'; }
file_size() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

# --- the three parts -------------------------------------------------------------------------------------------------
zip_name() { if [ "$1" = annotations ]; then echo annotations_trainval2017.zip; else echo "${1}2017.zip"; fi; }
zip_url() { if [ "$1" = annotations ]; then echo "$BASE_URL/annotations/$(zip_name "$1")"; else echo "$BASE_URL/zips/$(zip_name "$1")"; fi; }
inner_folder() { if [ "$1" = annotations ]; then echo annotations; else echo "${1}2017"; fi; }
destination() { if [ "$1" = annotations ]; then echo "$OUT/annotations"; else echo "$OUT/images/${1}2017"; fi; }
unpacked_size() { # PART ZIP_SIZE: pictures hardly shrink in a zip; the annotations are text and shrink to under a third
    if [ "$1" = annotations ]; then echo $(($2 * 4)); else echo "$2"; fi
}

# A folder gets its final name in one step, when it is whole. So one that is there is done, unless it is somebody else's.
is_done() {
    local folder
    folder=$(destination "$1")
    [ -e "$folder" ] || return 1
    [ -d "$folder" ] || die 2 "$folder is a file, where the folder of that name should go; move it away"
    [ -n "$(ls -A "$folder")" ] || return 1
    if [ "$1" = annotations ] && ! { [ -f "$folder/captions_train2017.json" ] && [ -f "$folder/captions_val2017.json" ]; }; then
        die 2 "$folder exists but lacks captions_train2017.json or captions_val2017.json; move it away and run this again"
    fi
}

# --- the network: curl, or else Python, which this project needs anyway ----------------------------------------------
find_python() { command -v python3 || command -v python || true; }

remote_size() { # URL: its length in bytes, or nothing if the server does not tell; fails with the reason on stderr
    if [ "$TOOL" = curl ]; then
        curl --silent --show-error --fail --location --head --connect-timeout 30 --max-time 60 "$1" | tr -d '\r' |
            awk 'tolower($1) ~ /^http\// { length_ = "" } tolower($1) == "content-length:" { length_ = $2 } END { print length_ }'
    else
        "$TOOL" - "$1" <<'EOF'
import sys
from urllib.request import Request, urlopen

try:
    with urlopen(Request(sys.argv[1], method="HEAD"), timeout=60) as answer:
        print(answer.headers.get("Content-Length", ""))
except (OSError, ValueError) as error:
    sys.exit(str(error))
EOF
    fi
}

NO_RESUME=33 # curl's code for a server that sends the whole file when asked for the rest of it
fetch_rest() { # URL FILE: appends what is missing; the code says little, so the caller looks at the file's size
    if [ "$TOOL" = curl ]; then
        local quiet="--silent --show-error"
        if [ -t 2 ]; then quiet=""; fi
        # shellcheck disable=SC2086
        curl $quiet --fail --location --connect-timeout 30 --speed-limit 1 --speed-time 60 --continue-at - --output "$2" "$1"
    else
        "$TOOL" - "$1" "$2" <<'EOF'
import http.client
import os
import sys
from urllib.request import Request, urlopen

url, path = sys.argv[1:]
have = os.path.getsize(path) if os.path.exists(path) else 0
try:
    with urlopen(Request(url, headers={"Range": "bytes=%d-" % have} if have else {}), timeout=60) as answer:
        if answer.status != 206:
            have = 0  # the whole file is coming
        total = have + int(answer.headers.get("Content-Length", 0))
        with open(path, "ab" if have else "wb") as file:
            while True:
                block = answer.read1(1 << 20)  # what has come, however little, so that a stop loses none of it
                if not block:
                    break
                file.write(block)
                file.flush()
                have += len(block)
                if sys.stderr.isatty():
                    print("\r%.1f of %.1f MB " % (have / 1e6, total / 1e6), end="", file=sys.stderr)
        if sys.stderr.isatty():
            print(file=sys.stderr)
except (OSError, http.client.HTTPException) as error:
    sys.exit(str(error))
EOF
    fi
}

fetch() { # URL FILE SIZE: until FILE has SIZE bytes. Goes on for as long as that brings something.
    local url=$1 file=$2 size=$3 before now code failures=0
    now=$(file_size "$file")
    if [ "$now" -gt "$size" ]; then # of another version of the file
        rm -f "$file"
        now=0
    fi
    while [ "$now" -ne "$size" ]; do
        before=$now
        code=0
        fetch_rest "$url" "$file" || code=$?
        now=$(file_size "$file")
        if [ "$now" -gt "$size" ]; then
            rm -f "$file"
            die 1 "$url sent more than the $size bytes that it had announced"
        elif [ "$code" -eq "$NO_RESUME" ]; then
            say "the server cannot send the rest of a file; starting this one again"
            rm -f "$file"
            now=0
            failures=$((failures + 1))
        elif [ "$now" -le "$before" ]; then
            failures=$((failures + 1))
        fi
        if [ "$now" -ne "$size" ]; then
            [ "$failures" -lt 3 ] ||
                die 1 "$url: stopped after $now of $size bytes; run this again to go on from there"
            sleep 1
        fi
    done
}

# --- zip files -------------------------------------------------------------------------------------------------------
zip_is_whole() { # FILE: reads all of it and compares every checksum
    if command -v unzip >/dev/null; then
        unzip -tqq "$1" >/dev/null 2>&1 </dev/null
    else
        "$PYTHON" - "$1" <<'EOF' 2>/dev/null
import sys
import zipfile

sys.exit(1 if zipfile.ZipFile(sys.argv[1]).testzip() else 0)
EOF
    fi
}

unpack() { # FILE FOLDER
    if command -v unzip >/dev/null; then
        unzip -qqo "$1" -d "$2" </dev/null
    else
        "$PYTHON" -m zipfile -e "$1" "$2"
    fi
}

# --- the run ---------------------------------------------------------------------------------------------------------
while [ $# -gt 0 ]; do
    case $1 in
    --help | -h)
        usage
        exit 0
        ;;
    --keep-zips)
        KEEP_ZIPS=yes
        shift
        ;;
    --out | --base-url | --only)
        [ $# -ge 2 ] && [ -n "$2" ] || die 2 "$1 needs a value; see --help"
        case $1 in
        --out) OUT=$2 ;;
        --base-url) BASE_URL=${2%/} ;;
        --only)
            case $2 in annotations | val | train) ONLY="$ONLY $2" ;; *) die 2 "--only takes annotations, val or train, not \"$2\"" ;; esac
            ;;
        esac
        shift 2
        ;;
    *) die 2 "unknown argument \"$1\"; see --help" ;;
    esac
done

PYTHON=$(find_python)
if command -v curl >/dev/null; then TOOL=curl; else TOOL=$PYTHON; fi
[ -n "$TOOL" ] || die 2 "neither curl nor python3 is installed; one of them is needed"
[ -n "$PYTHON" ] || command -v unzip >/dev/null || die 2 "neither unzip nor python3 is installed; one of them is needed"
mkdir -p "$OUT" 2>/dev/null && [ -w "$OUT" ] || die 2 "cannot write to the folder $OUT; choose another with --out"
OUT=$(cd "$OUT" && pwd)

# Two runs would write to the same files. The lock of a run that was killed does not count.
LOCK="$OUT/.download.lock"
UNPACKING="$OUT/.unpacking"
if ! mkdir "$LOCK" 2>/dev/null; then
    owner=$(cat "$LOCK/pid" 2>/dev/null || true)
    if [ -n "$owner" ] && kill -0 "$owner" 2>/dev/null; then
        die 2 "another download, process $owner, is at work in $OUT (if that is something else, delete $LOCK)"
    fi
fi
echo $$ >"$LOCK/pid"
trap 'rm -rf "$LOCK" "$UNPACKING"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# What is missing, and how much room it takes at the worst moment: a zip and what is in it, beside all parts before it.
missing=""
taken=0
peak=0
for part in annotations val train; do # the small ones first, so that what is wrong shows early
    case " ${ONLY:-$part} " in *" $part "*) ;; *) continue ;; esac
    if is_done "$part"; then
        say "$(destination "$part") is there already"
        continue
    fi
    url=$(zip_url "$part")
    size=$(remote_size "$url" 2>&1) || die 1 "cannot get $url: $(printf '%s' "$size" | head -n 1)"
    case $size in "" | *[!0-9]* | 0 | ????????????????*) die 1 "$url: the server does not say how large the file is" ;; esac
    part_file="$OUT/$(zip_name "$part").part"
    if [ -f "$OUT/$(zip_name "$part")" ]; then mv "$OUT/$(zip_name "$part")" "$part_file"; fi # checked again below
    have=$(file_size "$part_file")
    if [ "$have" -gt "$size" ]; then have=0; fi
    unpacked=$(unpacked_size "$part" "$size")
    at_worst=$((taken + size - have + unpacked))
    if [ "$at_worst" -gt "$peak" ]; then peak=$at_worst; fi
    if [ "$KEEP_ZIPS" = yes ]; then taken=$at_worst; else taken=$((taken + unpacked - have)); fi
    missing="$missing $part:$size"
done

if [ -n "$missing" ]; then
    # The number before the percentage: names of disks and folders may hold spaces.
    free=$(df -Pk "$OUT" | awk 'NR == 2 { for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+%$/) { printf "%.0f", $(i - 1) * 1024; exit } }')
    [ "${free:-0}" -ge "$peak" ] ||
        die 2 "too little room for $OUT: $(gigabytes "$peak") needed, $(gigabytes "${free:-0}") free; make room, or use --out or --only"
    say "up to $(gigabytes "$peak") needed, $(gigabytes "$free") free in $OUT"
fi

for entry in $missing; do
    part=${entry%%:*}
    size=${entry##*:}
    url=$(zip_url "$part")
    zip="$OUT/$(zip_name "$part")"
    folder=$(destination "$part")

    say "fetching $url ($(gigabytes "$size"))"
    had=$(file_size "$zip.part")
    fetch "$url" "$zip.part" "$size"
    say "checking $(zip_name "$part")"
    if ! zip_is_whole "$zip.part"; then
        rm -f "$zip.part"
        [ "$had" -gt 0 ] || die 1 "$url did not arrive as a whole zip file; deleted it, run this again"
        say "what was here of $(zip_name "$part") did not fit the rest; fetching it anew"
        fetch "$url" "$zip.part" "$size"
        zip_is_whole "$zip.part" || {
            rm -f "$zip.part"
            die 1 "$url did not arrive as a whole zip file; deleted it, run this again"
        }
    fi
    mv "$zip.part" "$zip"

    say "unpacking $(zip_name "$part") to $folder"
    rm -rf "$UNPACKING"
    mkdir -p "$UNPACKING" "$(dirname "$folder")"
    unpack "$zip" "$UNPACKING" || die 1 "could not unpack $zip; is the disk full? It is kept, so that another run need not fetch it"
    [ -d "$UNPACKING/$(inner_folder "$part")" ] || die 1 "$zip holds no folder $(inner_folder "$part"); it is not COCO's"
    if [ -d "$folder" ]; then rmdir "$folder"; fi # an empty one, as is_done has seen
    mv "$UNPACKING/$(inner_folder "$part")" "$folder"
    if [ "$KEEP_ZIPS" = no ]; then rm -f "$zip"; fi
done

say "COCO 2017 is in $OUT; next: python process_captions.py"
