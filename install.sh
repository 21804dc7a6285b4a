# Sourced by run_train.sh, run_tests.sh and .ci/run: `install FILE…` installs requirement files.
# Uses the active virtual environment, else .venv, which it creates. Installs again only if a file changed.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    . .venv/bin/activate
fi

install() {
    local stamp="$VIRTUAL_ENV/.installed-$(echo "$*" | tr -c 'a-z\n' '-')"
    local checksum file
    checksum=$(cat "$@" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$checksum" ]; then
        for file in "$@"; do python -m pip install --quiet -r "$file"; done
        echo "$checksum" >"$stamp"
    fi
}
