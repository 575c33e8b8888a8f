#!/bin/sh
# Installs the Debian packages that are missing. Usage: tools/deps.sh build|test|long|instructions
# Says what it installs; does nothing when everything is there; on other systems it names what to install.
set -eu
build="build-essential pkg-config libjpeg62-turbo-dev libpng-dev libwebp-dev libjansson-dev libpcre2-dev libutf8proc-dev \
libwebsockets-dev libwebsockets-evlib-uv libuv1-dev libyaml-dev libcurl4-openssl-dev libssl-dev \
libjs-marked node-dompurify libjs-highlight.js libjs-katex fonts-katex"
test="libcmocka-dev python3 python3-numpy python3-pytest python3-httpx python3-websockets python3-jsonschema curl openssl"
case "${1:-}" in
build) want=$build ;;
test) want="$build $test" ;;
long) want="$build $test libopenblas0-pthread" ;; # numpy's own BLAS is twenty times slower
instructions) want="$build python3 valgrind" ;;
*) echo "usage: tools/deps.sh build|test|long|instructions" >&2; exit 2 ;;
esac

if ! command -v dpkg-query >/dev/null 2>&1; then
    missing=""
    for lib in libjpeg libpng libwebp jansson libpcre2-8 libutf8proc libwebsockets libuv yaml-0.1 libcurl libcrypto; do
        pkg-config --exists "$lib" 2>/dev/null || missing="$missing $lib"
    done
    [ -z "$missing" ] && exit 0
    echo "deps: this is not Debian; please install the development files of:$missing" >&2
    exit 1
fi

missing=""
for p in $want; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
done
[ -z "$missing" ] && exit 0
echo "deps: installing$missing" >&2
sudo=""
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null 2>&1 || { echo "deps: run as root: apt-get install$missing" >&2; exit 1; }
    sudo=sudo
fi
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
# shellcheck disable=SC2086 # a list of names
$sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
