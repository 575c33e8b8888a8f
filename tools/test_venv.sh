#!/bin/sh
# A Python environment with test peers that Debian 12 does not package. Usage: tools/test_venv.sh clients|page
# Makes build/venv; "page" also installs Debian's chromium (Playwright drives that one, its own is not downloaded).
set -eu
cd "$(dirname "$0")/.."
case "${1:-}" in
clients) want="openai locust schemathesis httpx jsonschema pytest langchain-openai" deb="python3-venv wrk" ;;
page) want="playwright pytest" deb="python3-venv chromium fonts-noto-cjk" ;;
*) echo "usage: tools/test_venv.sh clients|page" >&2; exit 2 ;;
esac
missing=""
for p in $deb; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
done
if [ -n "$missing" ]; then
    echo "test_venv: installing$missing" >&2
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
[ -x build/venv/bin/python ] || /usr/bin/python3 -m venv build/venv
# shellcheck disable=SC2086 # a list of names
PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 build/venv/bin/pip install -q --disable-pip-version-check $want
