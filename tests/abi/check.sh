#!/bin/sh
# The ABI check. Usage: tests/abi/check.sh build/release (after make)
# 1. qvl.h compiles alone as C99, C11 and C++17; 2. exactly the promised symbols are exported, with their types and a SONAME;
# 3. qvl.hpp works; 4. what "make install" installs is enough to build the examples.
set -eu
cd "$(dirname "$0")/../.."
build=${1:-build/release}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
strict="-Wall -Wextra -Wshadow -pedantic -Werror"
fail() { echo "abi: $*" >&2; exit 1; }
same() { diff "$1" "$2" >&2 || fail "$3"; }

compilers="cc c++"
command -v clang >/dev/null 2>&1 && command -v clang++ >/dev/null 2>&1 && compilers="cc c++ clang clang++"
for c in $compilers; do
    case $c in *++) standards="c++11 c++17"; language=c++ ;; *) standards="c99 c11"; language=c ;; esac
    for std in $standards; do
        echo '#include <qvl.h>' | $c -x $language -std=$std $strict -Iinclude -fsyntax-only - || fail "qvl.h is not clean $std for $c"
    done
done

nm -D --defined-only "$build/libqvl.so" | awk '{print $3}' | LC_ALL=C sort >"$tmp/nm"
LC_ALL=C sort tests/abi/exported.txt >"$tmp/list"
grep -oE '\bqvl_[a-z0-9_]+\(' include/qvl.h | tr -d '(' | LC_ALL=C sort -u >"$tmp/header"
sed -n 's/^    X(.*, \(qvl_[a-z0-9_]*\), (.*/\1/p' tests/abi/link.c | LC_ALL=C sort >"$tmp/link"
same "$tmp/list" "$tmp/nm" "the library does not export what tests/abi/exported.txt lists"
same "$tmp/list" "$tmp/header" "qvl.h does not declare what tests/abi/exported.txt lists"
same "$tmp/list" "$tmp/link" "tests/abi/link.c does not have what tests/abi/exported.txt lists"
grep -qv '^qvl_' "$tmp/nm" && fail "a symbol without the prefix qvl_ is exported"
readelf -d "$build/libqvl.so" >"$tmp/dynamic"
grep -q 'SONAME.*\[libqvl\.so\.0\]' "$tmp/dynamic" || fail "the SONAME is not libqvl.so.0"
grep -E 'NEEDED.*(cuda|stdc\+\+)' "$tmp/dynamic" && fail "libqvl.so must not need this library"

cc -std=c99 $strict -Iinclude -o "$tmp/link_c" tests/abi/link.c "$build/libqvl.so" -Wl,-rpath,"$PWD/$build"
functions=$("$tmp/link_c")
[ "$functions" = "$(wc -l <"$tmp/list") functions" ] || fail "link.c: $functions"

for c in c++ $(command -v clang++ || true); do
    $c -std=c++17 $strict -Iinclude -Ibindings/cpp -o "$tmp/hpp" tests/abi/hpp.cpp "$build/libqvl.so" -Wl,-rpath,"$PWD/$build"
    [ "$("$tmp/hpp" examples/models/qvl-tiny examples/images/shapes.png)" = ok ] || fail "the test of qvl.hpp failed"
done

${MAKE:-make} --no-print-directory -s install CONFIG="$(basename "$build")" PREFIX="$tmp/usr" >/dev/null
export PKG_CONFIG_PATH="$tmp/usr/lib/pkgconfig" LD_LIBRARY_PATH="$tmp/usr/lib"
flags=$(pkg-config --cflags --libs qvl)
for e in caption chat batch; do cc -std=c11 $strict "examples/$e.c" $flags -o "$tmp/$e"; done
printf '#include <qvl.hpp>\nint main() { return qvl::all_options().empty(); }\n' >"$tmp/use.cpp"
c++ -std=c++17 $strict "$tmp/use.cpp" $flags -o "$tmp/use"
"$tmp/use" || fail "an installed qvl.hpp lists no options"
[ -n "$("$tmp/caption" examples/images/heart.jpg "$tmp/usr/share/qvl/models/qvl-tiny")" ] || fail "caption said nothing"
[ -n "$(cd / && env -u QVL_MODEL "$tmp/usr/bin/qvl" info)" ] || fail "the installed tool does not find its model"
echo "abi: $functions, header, qvl.hpp and installed files are as promised"
