#!/bin/sh
# Puts the page and its libraries into two sources to be linked into qvl-serve. Usage: tools/assets.sh OUTDIR
# Writes OUTDIR/assets.S (the bytes, plain and gzip) and OUTDIR/assets.c (the table of static.c: path, type, ETag).
# The libraries are Debian's packages (tools/deps.sh): marked, DOMPurify, highlight.js, KaTeX with its fonts.
set -eu
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out"
js=/usr/share/javascript
list() {
    echo "/ qvl-serve/web/index.html"
    echo "/status qvl-serve/web/status.html"
    echo "/docs qvl-serve/web/docs.html"
    echo "/openapi.json qvl-serve/openapi.json"
    for f in qvl-serve/web/*; do
        case $f in */index.html | */status.html | */docs.html) ;; *) echo "/static/${f##*/} $f" ;; esac
    done
    echo "/static/marked.js $js/marked/marked.min.js"
    echo "/static/purify.js /usr/share/nodejs/dompurify/dist/purify.min.js"
    echo "/static/highlight.js $js/highlight.js/highlight.min.js"
    echo "/static/highlight-light.css $js/highlight.js/styles/github.css"
    echo "/static/highlight-dark.css $js/highlight.js/styles/atom-one-dark.css"
    echo "/static/katex.js $js/katex/katex.min.js"
    echo "/static/katex.css $js/katex/katex.min.css"
    for f in /usr/share/fonts/truetype/katex/*.woff2; do echo "/static/fonts/${f##*/} $f"; done
}
type_of() {
    case $1 in
    *.html) echo "text/html; charset=utf-8" ;;
    *.js) echo "text/javascript; charset=utf-8" ;;
    *.css) echo "text/css; charset=utf-8" ;;
    *.json) echo "application/json" ;;
    *.svg) echo "image/svg+xml" ;;
    *.woff2) echo "font/woff2" ;;
    *.png) echo "image/png" ;;
    *) echo "assets: no type for $1" >&2; return 1 ;;
    esac
}
i=0
echo '.section .note.GNU-stack,"",@progbits
.section .rodata' >"$out/assets.S"
{
    echo '#include "asset.h"'
    echo 'extern const unsigned char'
} >"$out/externs"
: >"$out/table"
list | while read -r path file; do
    [ -r "$file" ] || { echo "assets: $file is missing (tools/deps.sh build installs it)" >&2; exit 1; }
    type=$(type_of "$file")
    source=$file
    if [ "$path" = /static/katex.css ]; then # the packaged style names several formats; only WOFF2 is shipped
        source=$out/katex.css
        sed "s/,url([^)]*\.woff) format('woff'),url([^)]*\.ttf) format('truetype')//g" "$file" >"$source"
    fi
    gzip -9nc "$source" >"$out/$i.gz"
    plain=$(wc -c <"$source")
    packed=$(wc -c <"$out/$i.gz")
    tag=$(sha256sum "$source" | cut -c1-32)
    printf '.global qvl_asset_%d\nqvl_asset_%d: .incbin "%s"\n' $i $i "$source" >>"$out/assets.S"
    pack=NULL
    if [ $((packed * 10)) -lt $((plain * 9)) ]; then
        printf '.global qvl_packed_%d\nqvl_packed_%d: .incbin "%s"\n' $i $i "$out/$i.gz" >>"$out/assets.S"
        echo "    qvl_packed_$i[]," >>"$out/externs"
        pack=qvl_packed_$i
    else packed=0; fi
    echo "    qvl_asset_$i[]," >>"$out/externs"
    printf '    {"%s", "%s", "\\"%s\\"", qvl_asset_%d, %s, %d, %d},\n' "$path" "$type" "$tag" $i $pack "$plain" "$packed" >>"$out/table"
    i=$((i + 1))
done
{
    sed '$s/,$/;/' "$out/externs"
    echo 'const asset assets[] = {'
    cat "$out/table"
    echo '};'
    echo 'const size_t assets_count = sizeof assets / sizeof *assets;'
} >"$out/assets.c"
